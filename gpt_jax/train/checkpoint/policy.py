"""When a checkpoint is due, and which ones stay."""

import math

from gpt_jax import config


def look_at_clock(step: int, since: int, seconds: float, every_minutes: float) -> tuple[bool, int]:
    """(whether to save, next step at which to ask), `seconds` after step `since`.

    A question costs a broadcast that waits for the device. So the next one comes after a twentieth
    of the period at the pace so far, and at its end at the latest.
    """
    period = 60.0 * every_minutes
    if seconds >= period:
        return True, step + 1

    steps_per_second = max(step - since, 1) / max(seconds, 1e-9)
    return False, step + max(1, int(min(period - seconds, period / 20) * steps_per_second))


def to_keep(metrics: dict[int, float | None], policy: config.Checkpoint) -> set[int]:
    """The steps that stay, of complete checkpoints `{step: value of policy.best_metric, or None}`.

    They are the last `keep_last`, the multiples of `keep_every_steps`, and those of `find_best`.
    """
    last = sorted(metrics)[-policy.keep_last :]
    every = [
        step for step in metrics if policy.keep_every_steps and step % policy.keep_every_steps == 0
    ]
    return {*last, *every, *find_best(metrics, policy)}


def find_best(metrics: dict[int, float | None], policy: config.Checkpoint) -> list[int]:
    """The `keep_best` steps with the smallest values, the best first. Of equal ones the newer."""
    scored = [step for step, value in metrics.items() if value is not None and math.isfinite(value)]
    return sorted(scored, key=lambda step: (metrics[step], -step))[: policy.keep_best]
