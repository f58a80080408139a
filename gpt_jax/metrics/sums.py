"""Metrics as mergeable sums, divided once.

Metrics are named `room/what`, one meaning each:

    train/loss  train/bits_per_byte  train/accuracy  train/learning_rate
    train/grad_norm  train/param_norm
    eval/loss  eval/bits_per_byte  eval/accuracy  eval/perplexity
    eval/<source>/<metric>  where a run has several sources
    eval/<set>/<metric>  of each held-out set that config.eval.sets names
    train/<name>  eval/<name>  what an objective sums besides
    sample/<n>  a text
    throughput/tokens_per_second  throughput/tokens_seen
    throughput/mfu_full  throughput/mfu_causal
    moe/balance  moe/router_z  moe/dropped  moe/load_max  moe/load_min
    time/<phase>  time/host  time/data_wait  fractions of the time, see Clock
    time/wall_seconds  of all sessions, see sessions.py
    session/<fact>  what a start of the run says of itself

A line of the training log holds means over all steps since the line before. The learning rate and
the norm of the parameters are those of the line's own step.
"""

import math
from typing import Any

import numpy as np

# name -> (sum, weight). Both are floats, or float32 scalars on a device. Sums may be arrays.
Sums = dict[str, tuple[Any, Any]]

LARGEST_EXPONENT = 709.78  # exp of more overflows a float64


def add_sums(a: Sums, b: Sums) -> Sums:
    """Sums of the union of what `a` and `b` summed. Works under jit.

    A name that only one of them has passes through.
    """
    both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
    return {**a, **b, **both}


def divide_sums(sums: Sums) -> dict[str, Any]:
    """sum / weight of each name, on the host, once, at print time. Weight 0 gives nan."""
    return {name: _divide(total, weight) for name, (total, weight) in sums.items()}


def _divide(total, weight):
    if not weight:
        return math.nan
    if np.ndim(total) == 0:
        return float(total) / float(weight)
    return np.asarray(total) / float(weight)


# What every objective sums, and what layers of experts report.
COMMON = ("objective", "loss", "bits_per_byte", "accuracy", "grad_norm", "param_norm")
EXPERTS = ("balance", "router_z", "dropped", "load")


def own_metrics(means: dict[str, Any]) -> dict[str, float]:
    """What an objective sums besides the names that every run has."""
    return {name: value for name, value in means.items() if name not in (*COMMON, *EXPERTS)}


class RunningSums:
    """Sums of the steps since the last line of the log, in float64 on the host.

    `add` takes the fetched sums of one step. `take` returns the means and begins anew. A name
    whose weight is 0 in all of these steps has no mean, and is left out.
    """

    def __init__(self):
        self._sums: Sums = {}

    def add(self, sums: Sums) -> None:
        wide = {
            name: (np.asarray(total, np.float64), np.asarray(weight, np.float64))
            for name, (total, weight) in sums.items()
        }
        self._sums = add_sums(self._sums, wide)

    def take(self) -> dict[str, Any]:
        weighted = {name: pair for name, pair in self._sums.items() if pair[1]}
        means = divide_sums(weighted)
        self._sums = {}
        return means


def expert_metrics(means: dict[str, Any]) -> dict[str, float]:
    """The `moe/…` metrics of a step's means; {} for a model without experts.

    They are the balance loss (1 is perfect), the router's mean square logarithm of Z, and the part
    of choices that was dropped. The loads are the largest and the smallest of an expert in any
    layer, in parts of an equal share.
    """
    if "load" not in means:
        return {}

    has_experts = means["load"].sum(1) > 0
    load = means["load"][has_experts]  # [layers with experts, experts]
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
    if not weight:
        return math.nan
    mean = float(nll_sum) / float(weight)
    return math.inf if mean > LARGEST_EXPONENT else math.exp(mean)
