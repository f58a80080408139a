"""Schedules against closed formulas, at the edges where they change."""

import math

import jax
import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.train.optim.schedule import SCHEDULES, make_schedule


def optim(**knobs):
    return config.Optim(**{"warmup_steps": 10, "decay_steps": 110, "final_fraction": 0.1, **knobs})


def nanogpt(step, warmup=10, end=110, peak=1e-3, low=1e-4):
    """nanoGPT's get_lr, written from its description."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end:
        return low
    return low + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup))) * (peak - low)


def test_cosine_is_nanogpts():
    rate = make_schedule(optim(schedule="cosine"))
    for step in (0, 1, 8, 9, 10, 11, 60, 109, 110, 111, 1000):
        np.testing.assert_allclose(1e-3 * rate(step), nanogpt(step), rtol=1e-6)


def test_warmup_is_the_same_line_for_all():
    for name in SCHEDULES:
        rate = make_schedule(optim(schedule=name))
        np.testing.assert_allclose(
            [rate(0), rate(4), rate(9), rate(10)], [1 / 11, 5 / 11, 10 / 11, 1], rtol=1e-6
        )


@pytest.mark.parametrize(
    "name, steps, expected",
    [
        ("constant", (10, 110, 500), (1, 1, 1)),
        ("linear", (35, 60, 85, 110, 500), (0.775, 0.55, 0.325, 0.1, 0.1)),
        ("wsd", (11, 82, 83, 109, 110, 500), (1, 1, 1 - 0.9 / 28, 0.1 + 0.9 / 28, 0.1, 0.1)),
        ("inverse_sqrt", (43, 98, 1099, 100_000), (0.5, 1 / 3, 0.1, 0.1)),
    ],
)
def test_after_warmup(name, steps, expected):
    # wsd decays over round(27.5) = 28 steps, from step 82.
    rate = make_schedule(optim(schedule=name, decay_fraction=0.25))
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    for name in SCHEDULES:
        assert make_schedule(optim(schedule=name, warmup_steps=0))(0) == 1


def test_spans_of_no_steps():
    assert make_schedule(optim(schedule="cosine", warmup_steps=110))(110) == pytest.approx(0.1)
    drop = make_schedule(optim(schedule="wsd", decay_fraction=0.0))
    assert (drop(109), drop(110)) == (1, pytest.approx(0.1))


def test_jit_and_vectors_agree_with_integers():
    steps = np.arange(130)
    for name in SCHEDULES:
        rate = make_schedule(optim(schedule=name))
        one_by_one = [rate(int(step)) for step in steps]
        np.testing.assert_allclose(jax.jit(rate)(steps), one_by_one, rtol=1e-6)
        assert min(one_by_one) >= 0 and max(one_by_one) <= 1


def test_errors_name_the_field():
    with pytest.raises(UsageError, match=r"config\.optim\.decay_steps = 0"):
        make_schedule(optim(schedule="cosine", decay_steps=0))
    make_schedule(optim(schedule="constant", decay_steps=0))
