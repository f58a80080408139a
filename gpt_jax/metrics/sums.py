"""Metrics: mergeable sums, and where the wall time goes (floor 0; called by loop, evals and
report).

Names are `room/what`, one meaning each:

    train/loss  train/bits_per_byte  train/accuracy  train/learning_rate  train/grad_norm  train/param_norm
    eval/loss   eval/bits_per_byte   eval/accuracy   eval/perplexity      sample/<n> (text)
    throughput/tokens_per_second  throughput/tokens_seen  throughput/mfu_full  throughput/mfu_causal
    moe/balance  moe/router_z  moe/dropped  moe/load_max  moe/load_min  (see expert_metrics)
    time/<phase of PHASES> (fractions, sum 1)  time/host  time/data_wait  (see Clock)
"""

import math
from typing import Any

import numpy as np

Sums = dict[
    str, tuple[Any, Any]
]  # name -> (sum, weight): floats or float32 scalars on device; a pytree


def add_sums(a: Sums, b: Sums) -> Sums:
    """Sums of the union of what `a` and `b` summed; a name only one of them has passes through.
    Works under jit."""
    both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
    return {**a, **b, **both}


def divide_sums(sums: Sums) -> dict[str, Any]:
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
