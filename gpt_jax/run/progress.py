"""What the loop carries along beside the state: writers, clock, and the numbers of the log."""

import itertools
import math
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from gpt_jax import config as configs
from gpt_jax.cluster import code_version
from gpt_jax.data import EvalBatches
from gpt_jax.errors import Diverged
from gpt_jax.hardware import find_peak, mfu_metrics
from gpt_jax.metrics import (
    WALL_SECONDS,
    BarWriter,
    Clock,
    JsonlWriter,
    OneStepLate,
    RunningSums,
    TensorBoardWriter,
    Writers,
    divide_sums,
    expert_metrics,
    make_session_row,
    own_metrics,
    read_history,
    read_jsonl,
)
from gpt_jax.model import count_params
from gpt_jax.run.notes import format_count, token_flops
from gpt_jax.run.parts import Parts
from gpt_jax.train import make_schedule

# The learning rate is computed for so many steps at once, because each operation waits for the
# device.
RATES_AT_ONCE = 4096

# The first steps of a session are no measure of its rate.
UNSTEADY_STEPS = 10


class Progress:
    """Writers, clock, and the numbers for the next line of the log.

    - `start` is the step that the session starts from.
    - `end` is the step after which it ends. That is the last one of the config, or the one where a
      request stops the run.
    - `heldout` are the held-out batches by source, and `sets` those by name of config.eval.sets.
      `shares(step)` is each source's part of the rows at a step.
    - `evaluated` is the last evaluation: its step and its metrics.
    - `saved` is the step of the last checkpoint, or None.
    - `origin` tells where the session comes from, for the report: `command`, and what differs from
      the `preset`. `changed` tells what differs from the checkpoint's config.
    - `lineage` names the other runs whose weights these are, oldest first.
    - `sizes` says how many rows each update has.
    - `carried` are files that each checkpoint keeps beside the weights, by name.
    - `base` names what lies beneath adapters, if the run learns them.
    - `compiled` are the batch shapes, (examples, pieces of each), that this session has had so far,
      each with its program.
    """

    def __init__(
        self,
        parts: Parts,
        workdir: Path,
        start: int,
        resumed: bool,
        beat: Callable[[], None],
        heldout: dict[str, EvalBatches],
        sets: dict[str, EvalBatches],
        shares: Callable[[int], Mapping[str, float]],
        say: Callable[[str], None],
        origin: Mapping[str, str],
        lineage: list[dict[str, Any]],
        sizes: configs.BatchSizes,
        carried: Mapping[str, bytes] = MappingProxyType({}),
        base: dict[str, Any] | None = None,
    ):
        self.parts = parts
        self.config = parts.config
        self.workdir = workdir
        self.start = start
        self.end = parts.config.train.steps
        self.beat = beat
        self.heldout = heldout
        self.sets = sets
        self.shares = shares
        self.say = say
        self.lineage = lineage
        self.sizes = sizes
        self.carried = carried
        self.base = base
        self.compiled: set[tuple[int, int]] = set()
        self.saved = start if resumed else None
        self.evaluated: tuple[int, dict[str, float]] = (start, {})

        self.late = OneStepLate()
        self.sums = RunningSums()
        self.peak = find_peak(parts.mesh.devices.flatten().tolist())
        with jax.set_mesh(parts.mesh):
            self.counts = count_params(parts.config.model)
        self.flops = self._count_flops()
        self._start_counters()
        # The writer below says what is damaged there.
        rows = read_jsonl(workdir / "metrics.jsonl", report=_say_nothing) if resumed else []
        self.history = read_history(rows)
        self.writers = self._make_writers(start if resumed else None, origin)
        # What comes before the loop is not the loop's time.
        self.began = time.perf_counter()
        self.mark = start, self.began
        self.clock = Clock()

    def _start_counters(self) -> None:
        self._rates: tuple[int, Any] = -1, None
        self._has_announced = False
        self.untaught = 0  # batches without a target since the last line of the log
        self._trained = 0, 0.0  # tokens and seconds of the steps of this session

    def _make_writers(self, resumed_at: int | None, origin: Mapping[str, str]) -> Writers:
        if jax.process_index() != 0:
            return Writers()
        log = self.config.log
        steps = self.config.train.steps
        jsonl = JsonlWriter(self.workdir / "metrics.jsonl", resumed_at, self.say)
        if self.start < steps:
            facts = {**describe_session(self.parts), **origin}
            jsonl.write(self.start, make_session_row(self.history, facts))

        writers: list = [jsonl]
        if log.tensorboard:
            writers.append(TensorBoardWriter(self.workdir / "tensorboard", resumed_at))
        bar = BarWriter(steps, self.start, log.progress, work=self.tokens, sets=tuple(self.sets))
        return Writers([*writers, bar])

    def _count_flops(self) -> dict[int, tuple[int, int]]:
        """{pieces of an example: FLOPs of a token, of the full attention map and of the causal}."""
        train = self.config.train
        lengths = {level.pieces: train.seq_len // level.pieces for level in self.sizes.levels}
        matmul = self.counts["matmul"]
        if self.parts.base is not None:
            # Frozen weights have no gradient, which is a third of the work of those that have.
            learned = sum(leaf.size for leaf in jax.tree.leaves(self.parts.abstract.params))
            matmul = matmul * 2 // 3 + learned
        return {
            pieces: token_flops(self.config, matmul, length) for pieces, length in lengths.items()
        }

    def mean_flops(self, start: int, stop: int) -> tuple[float, float]:
        """FLOPs of a token, as in `flops`: the mean over the updates after `start` until `stop`."""
        levels = self.sizes.levels
        begins = [start, *(level.step for level in levels if start < level.step < stop), stop]
        total = [0.0, 0.0]
        for begin, end in itertools.pairwise(begins):
            part = self.tokens(end) - self.tokens(begin)
            for i, flops in enumerate(self.flops[self.sizes.level(begin).pieces]):
                total[i] += part * flops
        tokens = self.tokens(stop) - self.tokens(start)
        return total[0] / tokens, total[1] / tokens

    def times(self) -> dict[str, float]:
        """Parts of this session's time, and the wall time of all sessions."""
        wall = self.history.wall_seconds + time.perf_counter() - self.began
        return self.clock.metrics() | {WALL_SECONDS: wall}

    def tokens(self, step: int) -> int:
        """The tokens that the first `step` updates read."""
        return self.sizes.examples(step) * self.config.train.seq_len

    def restart_rate(self, step: int) -> None:
        """Counts the throughput from here. Evaluation, saving and sampling are not part of it."""
        self.mark = step, time.perf_counter()

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`."""
        block, place = divmod(step - 1, RATES_AT_ONCE)
        if block != self._rates[0]:
            steps = block * RATES_AT_ONCE + np.arange(RATES_AT_ONCE)
            factors = np.asarray(make_schedule(self.config.optim)(steps))
            self._rates = block, self.config.optim.learning_rate * factors
        return float(self._rates[1][place])

    def announce_end(self, step: int) -> None:
        """Says once when the last step is to be expected, evaluation and saving aside."""
        if self._has_announced or step < self.start + UNSTEADY_STEPS:
            return
        self._has_announced = True

        tokens, seconds = self._trained
        rate = tokens / seconds
        steps = self.config.train.steps
        left = (self.tokens(steps) - self.tokens(step)) / rate
        end = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time.time() + left))
        self.say(f"{rate:,.0f} tokens/s so far: step {steps:,} is to be expected at {end}")

    def record(self, late: tuple[int, Any] | None, moment: float) -> None:
        """Checks that a finished step's sums are finite, and writes a line where one is due.

        `moment` is when the step was over, by `time.perf_counter`. The line has the means over the
        steps since the line before.
        """
        if late is None:
            return
        step, sums = late
        own = divide_sums(sums)
        if not sums["objective"][1]:
            # 0 / 0 is no divergence. The gradient is 0, see `train.step.divide_gradient`.
            self.untaught += 1
            del own["objective"]
        for name in ("objective", "grad_norm", "param_norm"):
            if name in own:
                self.check_finite(name, own[name], step)
        self.sums.add(sums)
        if step % self.config.log.every_steps and step != self.end:
            return

        means = self.sums.take()
        values = {
            f"train/{name}": means[name]
            for name in ("loss", "bits_per_byte", "accuracy", "grad_norm")
            if name in means
        }
        self.tell_untaught(step)
        values |= {f"train/{name}": value for name, value in own_metrics(means).items()}
        values |= expert_metrics(means)
        values["train/param_norm"] = own["param_norm"]
        values["train/learning_rate"] = self.learning_rate(step)
        values["throughput/tokens_seen"] = self.tokens(step)

        before, since = self.mark
        if step > before:
            tokens = self.tokens(step) - self.tokens(before)
            seconds = max(moment - since, 1e-9)
            self.mark = step, moment
            self._trained = self._trained[0] + tokens, self._trained[1] + seconds
            values["throughput/tokens_per_second"] = tokens / seconds
            flops = self.mean_flops(before, step)
            values |= mfu_metrics(*flops, tokens / seconds, self.peak.flops)
            self.announce_end(step)

        with self.clock.phase("log"):
            # At the end `finish` writes the times of the whole session.
            if step != self.end:
                values |= self.times()
            self.writers.write(step, values)

    def tell_untaught(self, step: int) -> None:
        """Says how many batches since the last line had no target."""
        if self.untaught:
            self.say(
                f"step {step}: {format_count(self.untaught, 'batch')} since the last line without "
                "a single target, so the gradient was 0; longer documents or longer rows have more"
            )
            self.untaught = 0

    def settle(self) -> None:
        """Waits for the last dispatched step and records it.

        What follows then has its own time, and its own place in the log.
        """
        with self.clock.phase("step", blocked=True):
            late = self.late.flush()
        self.record(late, time.perf_counter())

    def check_finite(self, name: str, value: float, step: int) -> None:
        """Raises Diverged for nan and infinities."""
        if math.isfinite(value):
            return
        before = "nothing was saved before it"
        if self.saved is not None:
            before = f"the last checkpoint, of step {self.saved}, is from before it"
        raise Diverged(
            f"the {name} at step {step} is {value}; {before}. Lower config.optim.learning_rate, "
            "or set config.optim.clip"
        )


def _say_nothing(line: str) -> None:
    """Drops a line that somebody else says."""


def describe_session(parts: Parts) -> dict[str, str | float]:
    """Where and on what this start of the program runs, for the report."""
    device = parts.mesh.devices.flat[0]
    processes = format_count(jax.process_count(), "process")
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "host": socket.gethostname(),
        "devices": f"{parts.mesh.size} x {device.device_kind}, {processes}",
        "code": code_version(),
        "data": f"{parts.config.data.where}, content {parts.data.content[:12]}",
        "learning_rate": parts.config.optim.learning_rate,
    }
