"""What the loop carries along besides the state (floor 3; called by loop.py)."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.data import EvalBatches
from gpt_jax.errors import Diverged
from gpt_jax.hardware import find_peak, mfu_metrics
from gpt_jax.metrics import (
    BarWriter,
    Clock,
    JsonlWriter,
    OneStepLate,
    TensorBoardWriter,
    Writers,
    divide_sums,
    expert_metrics,
)
from gpt_jax.model import count_params
from gpt_jax.run.notes import token_flops
from gpt_jax.run.parts import Parts
from gpt_jax.train import make_schedule

RATES_AT_ONCE = 4096  # learning rates


class Progress:
    """What `loop.run` carries along besides the state: writers, clock, and the numbers for the
    next log line."""

    def __init__(
        self,
        parts: Parts,
        workdir: Path,
        start: int,
        resumed: bool,
        beat: Callable[[], None],
        heldout: dict[str, EvalBatches],
        shares: Callable[[int], Mapping[str, float]],
        say: Callable[[str], None],
    ):
        config, model = parts.config, parts.config.model
        self.parts, self.workdir, self.config, self.start, self.beat = (
            parts,
            workdir,
            config,
            start,
            beat,
        )
        self.heldout, self.shares = (
            heldout,
            shares,
        )  # by source: held-out batches, and the part of the rows at a step
        self.late, self.began, self.announce = OneStepLate(), time.perf_counter(), say
        self.peak = find_peak(parts.mesh.devices.flatten().tolist())
        with jax.set_mesh(parts.mesh):
            self.counts = count_params(model)
        self.flops = token_flops(config, self.counts["matmul"])
        self.rates: tuple[int, Any] = -1, None  # see `learning_rate`
        self.batch_tokens = config.train.batch_size * config.train.seq_len
        self.mark = start, time.perf_counter()
        self.end = config.train.steps  # or where a request stops the run
        self.evaluated: tuple[int, dict[str, float]] = (
            start,
            {},
        )  # the last evaluation: its step and what it found
        self.writers = self._make_writers(start if resumed else None)
        self.clock = Clock()  # last: what came before is not the loop's

    def _make_writers(self, resumed_at: int | None) -> Writers:
        if jax.process_index() != 0:
            return Writers()
        log, steps = self.config.log, self.config.train.steps
        made = [JsonlWriter(self.workdir / "metrics.jsonl", resumed_at)]
        if log.tensorboard:
            made.append(TensorBoardWriter(self.workdir / "tensorboard", resumed_at))
        return Writers([*made, BarWriter(steps, self.start, log.progress)])

    def restart_rate(self, step: int) -> None:
        """Throughput counts from here: evaluation, saving and sampling are not part of it."""
        self.mark = step, time.perf_counter()

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`, from a block of many made at once: each operation waits for
        the device."""
        block, place = divmod(step - 1, RATES_AT_ONCE)
        if block != self.rates[0]:
            steps = block * RATES_AT_ONCE + np.arange(RATES_AT_ONCE)
            self.rates = (
                block,
                self.config.optim.learning_rate
                * np.asarray(make_schedule(self.config.optim)(steps)),
            )
        return float(self.rates[1][place])

    def announce_end(self, step: int, rate: float) -> None:
        """Once, when a rate is known: when the last step is to be expected, evaluation and
        saving aside."""
        if step < self.start + 10:  # the first ones are no measure
            return
        left = (self.config.train.steps - step) * self.batch_tokens / rate
        self.announce, say = lambda line: None, self.announce
        end = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time.time() + left))
        say(
            f"{rate:,.0f} tokens/s so far: step {self.config.train.steps:,} is to be expected at "
            f"{end}"
        )

    def record(self, late: tuple[int, Any] | None) -> None:
        """A finished step's sums: checks that they are finite, and writes a line where one is
        due."""
        if late is None:
            return
        step, means = late[0], divide_sums(late[1])
        for name in ("objective", "grad_norm", "param_norm"):
            check_finite(name, means[name], step)
        if step % self.config.log.every_steps and step != self.end:
            return
        values = {
            f"train/{name}": means[name]
            for name in ("loss", "bits_per_byte", "accuracy", "grad_norm", "param_norm")
        }
        values |= expert_metrics(means)
        values["train/learning_rate"] = self.learning_rate(step)
        values["throughput/tokens_seen"] = step * self.batch_tokens
        before, since = self.mark
        if step > before:
            rate = (step - before) * self.batch_tokens / (time.perf_counter() - since)
            values["throughput/tokens_per_second"] = rate
            values |= mfu_metrics(*self.flops, rate, self.peak.flops)
            self.announce_end(step, rate)
            self.restart_rate(step)
        with self.clock.phase("log"):
            if step != self.end:  # where the whole run's times are written, by `finish`
                values |= self.clock.metrics()
            self.writers.write(step, values)


def check_finite(name: str, value: float, step: int) -> None:
    """Raises Diverged for nan and infinities."""
    if not math.isfinite(value):
        raise Diverged(
            f"the {name} at step {step} is {value}; the last checkpoint is from before it. Lower "
            "config.optim.learning_rate, or set config.optim.clip"
        )
