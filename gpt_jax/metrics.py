"""Metrics: mergeable sums, and where the wall time goes (floor 0; called by loop, evals and
report).

Names are `room/what`, one meaning each:

    train/loss  train/bits_per_byte  train/accuracy  train/learning_rate  train/grad_norm  train/param_norm
    eval/loss   eval/bits_per_byte   eval/accuracy   eval/perplexity      sample/<n> (text)
    throughput/tokens_per_second  throughput/tokens_seen  throughput/mfu_full  throughput/mfu_causal
    moe/balance  moe/router_z  moe/dropped  moe/load_max  moe/load_min  (see expert_metrics)
    time/<phase of PHASES> (fractions, sum 1)  time/host  time/data_wait  (see Clock)
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Sums = dict[
    str, tuple[Any, Any]
]  # name -> (sum, weight): floats or float32 scalars on device; a pytree


def add(a: Sums, b: Sums) -> Sums:
    """Sums of the union of what `a` and `b` summed; a name only one of them has passes through.
    Works under jit."""
    both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
    return {**a, **b, **both}


def divide(sums: Sums) -> dict[str, Any]:
    """sum / weight of each name, on the host, once, at print time; weight 0 gives nan. Sums may
    be arrays."""

    def one(total, weight):
        return (
            float(total) / float(weight)
            if np.ndim(total) == 0
            else np.asarray(total) / float(weight)
        )

    return {
        name: one(total, weight) if weight else math.nan for name, (total, weight) in sums.items()
    }


def expert_metrics(means: dict[str, Any]) -> dict[str, float]:
    """`moe/...` of a step's means (see model/balance.py): the balance loss (1 is perfect), the
    router's mean square logarithm of Z, the part of choices that was left out, and the largest
    and smallest load of an expert in any layer, in parts of an equal share. {} for a model
    without experts."""
    if "load" not in means:
        return {}
    load = means["load"][means["load"].sum(1) > 0]  # [layers with experts, E]
    relative = load / load.mean(1, keepdims=True)
    return {
        "moe/balance": means["balance"],
        "moe/router_z": means["router_z"],
        "moe/dropped": means["dropped"],
        "moe/load_max": float(relative.max()),
        "moe/load_min": float(relative.min()),
    }


def perplexity(nll_sum: float, weight: float) -> float:
    """exp of the mean loss; inf where that overflows a float, nan without weight."""
    mean = float(nll_sum) / float(weight) if weight else math.nan
    return math.inf if mean > 709.78 else math.exp(mean)


class OneStepLate:
    """Holds a step's metrics on the device until the next step is dispatched, so that reading
    them stalls nothing. `push` right after dispatching step n returns (step, host values) of the
    push before, or None; it starts step n's copy to the host in the background. `flush` returns
    what is left: call it before saving and at the end."""

    _held = None

    def push(self, step: int, values) -> tuple[int, Any] | None:
        for leaf in jax.tree.leaves(values):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        return self._swap((step, values))

    def flush(self) -> tuple[int, Any] | None:
        return self._swap(None)

    def _swap(self, held) -> tuple[int, Any] | None:
        late, self._held = self._held, held
        return late and (late[0], jax.device_get(late[1]))


PHASES = ("data", "step", "eval", "checkpoint", "compile", "sample", "log", "other")
LOOP = ("data", "step", "log", "other")  # what happens at every step


class Clock:
    """Wall time by phase. `with clock.phase("data", blocked=True): …` counts the time to "data"
    and as waiting. Every moment since the start belongs to exactly one phase ("other" outside of
    any); a phase inside another takes its time from the outer one. `blocked` marks waiting for
    the device or for the input queue."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds = {(phase, blocked): 0.0 for phase in PHASES for blocked in (False, True)}
        self._stack = [("other", False)]
        self._since = now()

    def _settle(self) -> None:
        moment = self._now()
        self._seconds[self._stack[-1]] += moment - self._since
        self._since = moment

    @contextlib.contextmanager
    def phase(self, name: str, blocked: bool = False):
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: choose one of {', '.join(PHASES)}")
        self._settle()
        self._stack.append((name, blocked))
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def fractions(self) -> dict[str, float]:
        """Part of the wall time of each phase; they sum to 1 (all 0 before any time has passed)."""
        self._settle()
        return self._parts(PHASES, {phase: ((phase, False), (phase, True)) for phase in PHASES})

    def loop_fractions(self) -> dict[str, float]:
        """Parts of the loop's time (LOOP phases). host: not blocked on device or data, its own
        overhead; data_wait: blocked on the input queue, near 0 when input never starves the
        device."""
        self._settle()
        return self._parts(
            LOOP, {"host": [(phase, False) for phase in LOOP], "data_wait": [("data", True)]}
        )

    def _parts(self, phases, parts) -> dict[str, float]:
        total = sum(self._seconds[phase, blocked] for phase in phases for blocked in (False, True))
        return {
            name: sum(self._seconds[key] for key in keys) / (total or 1.0)
            for name, keys in parts.items()
        }

    def metrics(self) -> dict[str, float]:
        """Both under their metric names, `time/…`."""
        return {
            f"time/{name}": part
            for name, part in {**self.fractions(), **self.loop_fractions()}.items()
        }
