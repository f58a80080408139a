"""Learning-rate schedules as factors of the peak rate.

Steps are counted from 0, so `schedule(0)` scales the first update. `step` is float32. `start` is
the first step after the warmup, and `end` is `optim.decay_steps`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt_jax import config
from gpt_jax.errors import UsageError


def progress(step, start: int, end: int) -> jax.Array:
    """0 at `start`, 1 at `end` and beyond. A span without steps ends where it begins."""
    if end <= start:
        return (step >= start).astype(jnp.float32)
    return jnp.clip((step - start) / (end - start), 0.0, 1.0)


def _constant(optim: config.Optim, step) -> jax.Array:
    return jnp.ones_like(step)


def _cosine(optim: config.Optim, step) -> jax.Array:
    done = progress(step, optim.warmup_steps, optim.decay_steps)
    return optim.final_fraction + (1 - optim.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))


def _linear(optim: config.Optim, step) -> jax.Array:
    done = progress(step, optim.warmup_steps, optim.decay_steps)
    return 1 - (1 - optim.final_fraction) * done


def _wsd(optim: config.Optim, step) -> jax.Array:
    done = progress(step, config.wsd_start(optim), optim.decay_steps)
    return 1 - (1 - optim.final_fraction) * done


def _inverse_sqrt(optim: config.Optim, step) -> jax.Array:
    # The curve meets the warmup's line, (step + 1) / (warmup + 1), at 1.
    return jnp.maximum(optim.final_fraction, jnp.sqrt((optim.warmup_steps + 1) / (step + 1)))


SCHEDULES = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}


def make_schedule(optim: config.Optim) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """`schedule(step) -> factor` in [0, 1], float32, in the shape of `step`.

    It works inside jit and on plain integers. All schedules have a warmup, which is
    (step + 1) / (warmup_steps + 1) while step < warmup_steps (nanoGPT's `get_lr`). After it:

    - constant: 1.
    - cosine: from 1 to final_fraction at decay_steps, constant beyond (nanoGPT).
    - linear: from 1 to final_fraction at decay_steps in a straight line, constant beyond.
    - wsd (warmup, stable, decay; Hu et al. 2024, arXiv 2404.06395): 1, then in a straight line to
      final_fraction over the last decay_fraction of decay_steps.
    - inverse_sqrt: sqrt((warmup_steps + 1) / (step + 1)), never below final_fraction.

    Raises UsageError if the schedule needs an end and decay_steps is not resolved, that is 0.
    """
    if not optim.decay_steps and optim.schedule not in config.ENDLESS:
        raise UsageError(
            f"config.optim.decay_steps = 0: schedule {optim.schedule!r} needs its last step; "
            "set it, or resolve the config first"
        )
    after = SCHEDULES[optim.schedule]

    def schedule(step) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = (step + 1) / (optim.warmup_steps + 1)
        return jnp.where(step < optim.warmup_steps, warmup, after(optim, step))

    return schedule
