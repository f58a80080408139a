"""Sums, the clock and one-step-late metrics."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.metrics import sums as metrics
from gpt_jax.metrics.clock import Clock, OneStepLate

# --- sums ---


def test_merged_parts_equal_the_whole():
    rng = random.Random(0)
    rows = [(rng.uniform(0, 9), rng.choice([0, 1, 3])) for _ in range(30)]  # (value, weight)

    def sums(part):
        return {"loss": (sum(v * w for v, w in part), sum(w for _, w in part))}

    merged = {}
    for cut in (slice(0, 7), slice(7, 8), slice(8, 30)):
        merged = metrics.add_sums(merged, sums(rows[cut]))
    assert metrics.divide_sums(merged)["loss"] == pytest.approx(
        metrics.divide_sums(sums(rows))["loss"], rel=1e-12
    )


def test_add_works_under_jit_and_keeps_names_of_either_side():
    a = {"x": (jnp.float32(1), jnp.float32(2)), "a": (3.0, 4.0)}
    b = {"x": (10.0, 20.0), "b": (5.0, 6.0)}
    assert jax.device_get(jax.jit(metrics.add_sums)(a, b)) == {
        "x": (11, 22),
        "a": (3, 4),
        "b": (5, 6),
    }


@pytest.mark.filterwarnings("error")
def test_weight_zero_is_nan_without_a_warning():
    assert math.isnan(metrics.divide_sums({"x": (jnp.float32(0), jnp.float32(0))})["x"])
    assert math.isnan(metrics.perplexity(1.0, 0))


def test_perplexity_of_a_uniform_guess():
    assert metrics.perplexity(7 * math.log(256), 7) == pytest.approx(256)
    assert metrics.perplexity(1e6, 1) == math.inf


def test_running_sums_are_the_mean_of_all_tokens_since_the_last_line():
    steps = [(10.0, 2.0), (9.0, 3.0), (1.0, 1.0)]  # (sum, weight) with unequal weights
    running = metrics.RunningSums()
    for total, weight in steps:
        running.add({"loss": (jnp.float32(total), jnp.float32(weight))})
    assert running.take() == {"loss": 20 / 6}

    running.add({"loss": (4.0, 2.0)})
    assert running.take() == {"loss": 2.0}  # the line before has left nothing
    assert running.take() == {}


def test_running_sums_leave_out_what_has_no_weight():
    running = metrics.RunningSums()
    running.add({"loss": (0.0, 0.0), "norm": (2.0, 1.0)})
    assert running.take() == {"norm": 2.0}
    running.add({"loss": (0.0, 0.0)})
    running.add({"loss": (6.0, 2.0)})
    assert running.take() == {"loss": 3.0}


def test_running_sums_hold_what_float32_would_lose():
    running = metrics.RunningSums()
    for total in (2.0**24, 1.0, 1.0):
        running.add({"x": (np.float32(total), np.float32(1)), "load": (np.full(2, total), 1.0)})
    means = running.take()
    assert means["x"] * 3 == 2**24 + 2
    np.testing.assert_array_equal(means["load"] * 3, [2**24 + 2] * 2)


# --- one step late ---


def test_metrics_come_one_push_late_and_in_order():
    late = OneStepLate()
    seen = []
    for step in range(4):
        seen.append(late.push(step, {"loss": (jnp.float32(step * 2), 1.0)}))
    assert seen == [None] + [(step, {"loss": (step * 2, 1.0)}) for step in range(3)]
    assert late.flush() == (3, {"loss": (6, 1.0)})
    assert late.flush() is None


def test_a_value_is_read_only_after_the_next_push(monkeypatch):
    read = []
    device_get = jax.device_get

    def note_and_get(value):
        read.append(float(value))
        return device_get(value)

    monkeypatch.setattr(jax, "device_get", note_and_get)
    late = OneStepLate()
    late.push(0, jnp.float32(5))
    assert read == []
    late.push(1, jnp.float32(6))
    assert read == [5.0]


# --- clock ---


class Time:
    def __init__(self):
        self.value = 100.0

    def __call__(self):
        return self.value


def test_clock_splits_all_time_and_nested_time_counts_once():
    now = Time()
    clock = Clock(now)
    assert set(clock.fractions().values()) == {0.0}
    now.value += 1  # other
    for _ in range(2):
        with clock.phase("data", blocked=True):
            now.value += 0.5
        with clock.phase("step"):
            now.value += 0.25
            with clock.phase("step", blocked=True):
                now.value += 1
            with clock.phase("log"):
                now.value += 0.25
    with clock.phase("eval"):
        now.value += 4
        with clock.phase("checkpoint"):
            now.value += 1
    fractions = clock.fractions()
    assert sum(fractions.values()) == 1
    assert {k: v * 10 for k, v in fractions.items() if v} == {
        "other": 1,
        "data": 1,
        "step": 2.5,
        "log": 0.5,
        "eval": 4,
        "checkpoint": 1,
    }
    # The loop takes 5 s: 2 on the host (other 1, and four times 0.25), and 1 waiting for data.
    assert clock.loop_fractions() == {"host": 2 / 5, "data_wait": 1 / 5}
    assert clock.metrics()["time/eval"] == 0.4 and clock.metrics()["time/host"] == 0.4


def test_clock_leaves_the_phase_on_an_error_and_knows_its_phases():
    now = Time()
    clock = Clock(now)
    with pytest.raises(KeyError), clock.phase("step"):
        raise KeyError
    now.value += 3
    assert clock.fractions()["other"] == 1
    with pytest.raises(ValueError, match="coffee"), clock.phase("coffee"):
        pass


def test_expert_metrics_are_relative_to_an_equal_share():
    load = np.array([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])  # layer 1 is dense
    means = {"load": load, "balance": 1.25, "router_z": 4.0, "dropped": 0.1}
    assert metrics.expert_metrics(means) == {
        "moe/balance": 1.25,
        "moe/router_z": 4.0,
        "moe/dropped": 0.1,
        "moe/load_max": 1.5,
        "moe/load_min": 0.5,
    }
    assert metrics.expert_metrics({"loss": 1.0}) == {}


def test_divide_keeps_arrays():
    means = metrics.divide_sums(
        {"load": (np.array([2.0, 6.0]), 4.0), "loss": (3.0, 2.0), "none": (np.ones(2), 0.0)}
    )
    np.testing.assert_array_equal(means["load"], [0.5, 1.5])
    assert means["loss"] == 1.5 and math.isnan(means["none"])
