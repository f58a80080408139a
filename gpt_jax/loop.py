"""The one loop: trains the parts of a run to its last step (floor 3; called by the train command).

All processes of a job execute the same lines; only process 0 writes and prints. Another kind of loop is a file beside
this one, on the same parts.
"""

import fcntl
import math
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Mapping

import jax
import numpy as np

from gpt_jax import config as configs
from gpt_jax import devices, evals, placing, report
from gpt_jax.data.pipeline import EvalBatches, make_eval_batches, make_stream
from gpt_jax.errors import Diverged, Stopped, UsageError
from gpt_jax.experiment import Parts, items, start_state, token_flops
from gpt_jax.metrics import Clock, OneStepLate, divide, expert_metrics
from gpt_jax.model.transformer import count_params
from gpt_jax.stops import StopRequest, peer_gone, watchdog
from gpt_jax.train import checkpoint
from gpt_jax.train.agreement import agree
from gpt_jax.train.schedule import make_schedule
from gpt_jax.train.step import TrainState
from gpt_jax.writers import BarWriter, JsonlWriter, TensorBoardWriter, Writers, read_jsonl, replace_file


RATES_AT_ONCE = 4096  # learning rates


class Loop:
    """What `run` carries along besides the state: writers, clock, and the numbers for the next log line."""

    def __init__(self, parts: Parts, workdir: Path, start: int, resumed: bool, beat: Callable[[], None],
                 heldout: dict[str, EvalBatches], shares: Callable[[int], Mapping[str, float]],
                 say: Callable[[str], None]):
        config, model = parts.config, parts.config.model
        self.parts, self.workdir, self.config, self.start, self.beat = parts, workdir, config, start, beat
        self.heldout, self.shares = heldout, shares  # by source: held-out batches, and the part of the rows at a step
        self.late, self.began, self.announce = OneStepLate(), time.perf_counter(), say
        self.peak = devices.find_peak(parts.mesh.devices.flatten().tolist())
        with jax.set_mesh(parts.mesh):
            self.counts = count_params(model)
        self.flops = token_flops(config, self.counts["matmul"])
        self.rates: tuple[int, Any] = -1, None  # see `learning_rate`
        self.batch_tokens = config.train.batch_size * config.train.seq_len
        self.mark = start, time.perf_counter()
        self.end = config.train.steps  # or where a request stops the run
        self.evaluated: tuple[int, dict[str, float]] = start, {}  # the last evaluation: its step and what it found
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
        """The rate of update `step`, from a block of many made at once: each operation waits for the device."""
        block, place = divmod(step - 1, RATES_AT_ONCE)
        if block != self.rates[0]:
            steps = block * RATES_AT_ONCE + np.arange(RATES_AT_ONCE)
            self.rates = block, self.config.optim.learning_rate * np.asarray(make_schedule(self.config.optim)(steps))
        return float(self.rates[1][place])

    def announce_end(self, step: int, rate: float) -> None:
        """Once, when a rate is known: when the last step is to be expected, evaluation and saving aside."""
        if step < self.start + 10:  # the first ones are no measure
            return
        left = (self.config.train.steps - step) * self.batch_tokens / rate
        self.announce, say = lambda line: None, self.announce
        end = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time.time() + left))
        say(f"{rate:,.0f} tokens/s so far: step {self.config.train.steps:,} is to be expected at {end}")

    def record(self, late: tuple[int, Any] | None) -> None:
        """A finished step's sums: checks that they are finite, and writes a line where one is due."""
        if late is None:
            return
        step, means = late[0], divide(late[1])
        for name in ("objective", "grad_norm", "param_norm"):
            check_finite(name, means[name], step)
        if step % self.config.log.every_steps and step != self.end:
            return
        values = {f"train/{name}": means[name] for name in ("loss", "bits_per_byte", "accuracy", "grad_norm",
                                                            "param_norm")}
        values |= expert_metrics(means)
        values["train/learning_rate"] = self.learning_rate(step)
        values["throughput/tokens_seen"] = step * self.batch_tokens
        before, since = self.mark
        if step > before:
            rate = (step - before) * self.batch_tokens / (time.perf_counter() - since)
            values["throughput/tokens_per_second"] = rate
            values |= devices.mfu_metrics(*self.flops, rate, self.peak.flops)
            self.announce_end(step, rate)
            self.restart_rate(step)
        with self.clock.phase("log"):
            if step != self.end:  # where the whole run's times are written, by `finish`
                values |= self.clock.metrics()
            self.writers.write(step, values)


def check_finite(name: str, value: float, step: int) -> None:
    """Raises Diverged for nan and infinities."""
    if not math.isfinite(value):
        raise Diverged(f"the {name} at step {step} is {value}; the last checkpoint is from before it. Lower "
                       "config.optim.learning_rate, or set config.optim.clip")


def run(parts: Parts, workdir: Path, profile: tuple[int, int] | None = None,
        say: Callable[[str], None] = print) -> report.Summary:
    """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one; returns the numbers.

    `profile`: (first, last) step of a trace in `workdir`/profile. Raises Stopped after a SIGTERM or SIGUSR1 (saved),
    Diverged, DataError, SaveFailed, NoCheckpoint, UsageError."""
    config, mesh = parts.config, parts.mesh
    train, rows = config.train, placing.process_rows(mesh, config.train.batch_size)
    for note in parts.notes:
        say(note)
    with jax.set_mesh(mesh), watchdog(train.hang_minutes) as beat, ExitStack() as closing:
        closing.enter_context(only_run(workdir, say))
        stop = StopRequest()
        closing.callback(stop.close)
        checkpoints = checkpoint.open_checkpoints(workdir / checkpoint.FOLDER, config.checkpoint, say)
        # A save in flight would wait for a peer that has left.
        closing.push(lambda kind, error, trace: None if peer_gone(error) else checkpoints.close())
        start = checkpoints.latest or 0
        if profile and profile[0] <= start:
            raise UsageError(f"--profile={profile[0]}:{profile[1]}: this run goes on at step {start + 1}; start there or "
                             "later")
        # Before the state: it refuses too little text, and compiles nothing.
        stream = make_stream(parts.data, config.data, train.seq_len, train.batch_size, config.seed, rows, start, train.steps)
        closing.callback(stream.close)
        heldout = heldout_batches(parts)
        state = start_state(parts, checkpoints, say)
        if jax.process_index() == 0:
            replace_file(workdir / "config.json", configs.to_json(config).encode())
        loop = Loop(parts, workdir, start, checkpoints.latest is not None, beat, heldout, stream.shares, say)
        closing.callback(loop.writers.close)
        if start < train.steps and jax.process_index() == 0:
            (workdir / "report.html").unlink(missing_ok=True)  # of an earlier stop: `conclude` takes it for the end's
        say(loop.peak.line)
        for line in stream.summary:
            say(line)
        for step in range(start + 1, train.steps + 1):
            with loop.clock.phase("data", blocked=True):
                columns = next(stream)
            state = one_step(loop, state, step, columns, profile)
            beat()
            checkpoints.check()
            stopping = stop(step)
            loop.end = step if stopping else loop.end
            if stopping:  # first of all, and so without metrics of this step: who asks may not wait long
                save(loop, checkpoints, state, step)
                with loop.clock.phase("checkpoint", blocked=True):
                    checkpoints.wait()
            if due(config.eval.every_steps, step) or step == train.steps:
                evaluate(loop, state, step)
            if due(config.eval.sample_every_steps, step) and step < train.steps:
                write_samples(loop, state, step, 1)
            if checkpoints.should_save(step) or (step == train.steps and not stopping):
                save(loop, checkpoints, state, step)
            beat()
            if stopping and step < train.steps:
                finish(loop, step)
                raise Stopped(f"stopped on request after step {step} of {train.steps}, saved in "
                              f"{checkpoints.directory}; the same command goes on from there")
        return conclude(loop, checkpoints, state, say)


def heldout_batches(parts: Parts) -> dict[str, EvalBatches]:
    """By source: all held-out batches or the first few, as config.eval says. UsageError for too little."""
    config = parts.config
    rows = placing.process_rows(parts.mesh, config.eval.batch_size)
    return {name: make_eval_batches(tokens, parts.data.tokenizer, config.data, config.train.seq_len, config.eval.batch_size,
                                    rows, config.eval.batches, f"the held-out text of source {name}")
            for name, tokens in parts.data.heldout.items()}


@contextmanager
def only_run(workdir: Path, say):
    """Holds the workdir for this run alone; UsageError on all processes when another run has it."""
    with ExitStack() as closing:
        def take():
            try:
                fcntl.flock(closing.enter_context(open(workdir / ".lock", "a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"--workdir={workdir}: another run is training into it; wait for it, stop it, or choose "
                                 "another --workdir") from None
            except OSError as error:  # a file system without locks
                say(f"{workdir} cannot be locked ({error.strerror}): a second run in it would not be noticed")

        agree(take)
        yield


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def one_step(loop: Loop, state: TrainState, step: int, columns, profile) -> TrainState:
    """Dispatches update `step` and handles the sums of the one before."""
    parts, first = loop.parts, step == loop.start + 1
    if profile and step == profile[0]:
        jax.profiler.start_trace(str(loop.workdir / "profile"))
    with loop.clock.phase("data"):
        batch = placing.to_devices(parts.mesh, columns, loop.config.train.batch_size)
    with loop.clock.phase("compile" if first else "step"):
        state, sums = parts.train_step(state, batch)
        if first:
            jax.block_until_ready(sums)
            loop.restart_rate(step)
    with loop.clock.phase("step", blocked=True):
        late = loop.late.push(step, sums)
    loop.record(late)
    if profile and step == profile[1]:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
    return state


def settle(loop: Loop) -> None:
    """Waits for the last dispatched step and records it, so that what follows is timed and ordered by itself."""
    with loop.clock.phase("step", blocked=True):
        late = loop.late.flush()
    loop.record(late)


def averaged_params(loop: Loop, state: TrainState):
    """The averaged weights where the run keeps them, else the current ones."""
    return state.ema if loop.config.train.ema else state.params


def evaluate(loop: Loop, state: TrainState, step: int) -> None:
    """Held-out metrics after update `step`."""
    settle(loop)
    if loop.heldout:
        with loop.clock.phase("eval"):
            found = {name: evals.heldout_metrics(evals.heldout_sums(
                loop.parts.eval_step, averaged_params(loop, state), watched(batches, loop.beat), loop.parts.mesh,
                loop.config.eval.batch_size)) for name, batches in loop.heldout.items()}
        found = evals.by_source(found, loop.shares(step))
        check_finite("held-out loss", found["eval/loss"], step)
        loop.evaluated = step, found
        loop.writers.write(step, found)
    loop.restart_rate(step)


def watched(batches, beat: Callable[[], None]):
    """`batches`, telling the watchdog at each that the run is alive."""
    for batch in batches:
        beat()
        yield batch


def write_samples(loop: Loop, state: TrainState, step: int, count: int) -> None:
    """`count` samples, into the writers."""
    settle(loop)
    with loop.clock.phase("sample"):
        texts = evals.samples(loop.config.model, averaged_params(loop, state), loop.parts.data.tokenizer,
                              loop.config.eval, (loop.config.seed + step) % 2**32, count)
    for i, text in enumerate(texts):
        loop.writers.text(step, f"sample/{i}", text)
    loop.restart_rate(step)


def save(loop: Loop, checkpoints, state: TrainState, step: int) -> None:
    """Starts an asynchronous checkpoint of everything that evaluating, generating and resuming need."""
    settle(loop)
    with loop.clock.phase("checkpoint"):
        meta = {"config": configs.to_dict(loop.config), "tokenizer": loop.parts.data.tokenizer.to_json(),
                "data": {"next": step, "content": loop.parts.data.content}}
        at, found = loop.evaluated
        checkpoints.save(step, meta=meta, metrics=found if at == step else {}, **items(state))
    loop.restart_rate(step)


def finish(loop: Loop, step: int, **facts) -> report.Summary | None:
    """loss.png and report.html from what metrics.jsonl holds by now (process 0)."""
    if step > loop.start:  # else nothing was trained, and the times are those of the run that did
        loop.writers.write(step, loop.clock.metrics())
    if jax.process_index() != 0:
        return None
    rows = read_jsonl(loop.workdir / "metrics.jsonl")
    summary = report.summarize(rows, parameters=loop.counts["total"], peak=loop.peak.line,
                               wall_seconds=time.perf_counter() - loop.began, **facts)
    kind = loop.parts.mesh.devices.flat[0].device_kind
    report.write_report(loop.workdir, title=loop.workdir.name, summary=summary, samples=report.samples_in(rows),
                        versions={"device": f"{loop.parts.mesh.size} x {kind}"} | report.library_versions())
    return summary


def conclude(loop: Loop, checkpoints, state: TrainState, say) -> report.Summary | None:
    """The end of a run that got to its last step: three samples, the report, and where everything is. What a run that
    was already there has is not made again."""
    config, steps = loop.config, max(loop.config.train.steps, loop.start)
    def found():
        keys = {key for row in read_jsonl(loop.workdir / "metrics.jsonl") if row["step"] == steps for key in row}
        return ["eval/loss" in keys, "sample/2" in keys, (loop.workdir / "report.html").exists()]

    measured, sampled, page = agree(found)
    if loop.start >= steps and sampled and page:
        say(f"finished before, at step {steps}: see {loop.workdir / 'report.html'}; for more steps raise "
            "config.train.steps")
        return None
    if not measured:
        evaluate(loop, state, steps)
    if not sampled:
        write_samples(loop, state, steps, 3)
    with loop.clock.phase("checkpoint", blocked=True):
        checkpoints.wait()
    facts = {}
    if config.eval.compare_xz and jax.process_index() == 0:
        facts["xz_bits_per_byte"] = evals.xz_bits_per_byte(loop.parts.data)
    summary = finish(loop, steps, **facts)
    if summary is not None:
        names = {"checkpoints": checkpoints.directory, "metrics": "metrics.jsonl", "loss curve": "loss.png",
                 "report": "report.html"}
        for line in report.summary_lines(summary, {name: loop.workdir / path for name, path in names.items()}):
            say(line)
    return summary
