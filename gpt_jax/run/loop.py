"""The one loop: trains the parts of a run to its last step.

All processes of a job execute the same lines. Only process 0 writes and prints. Another kind of
loop is a file beside this one, on the same parts.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.cluster import StopRequest, agree_on, is_peer_gone, watchdog
from gpt_jax.data import Stream, is_remote, make_ramp_stream
from gpt_jax.errors import Stopped, UsageError
from gpt_jax.evals import measure_xz_bits_per_byte
from gpt_jax.metrics import (
    Summary,
    find_samples,
    format_summary,
    library_versions,
    read_jsonl,
    save_file,
    saving,
    summarize,
    write_report,
)
from gpt_jax.run.collector import collecting_by_step
from gpt_jax.run.convert import CARRIED_FOLDER
from gpt_jax.run.evaluation import evaluate, heldout_batches, set_batches, write_samples
from gpt_jax.run.exporter import Exporter, open_exporter
from gpt_jax.run.lock import only_run
from gpt_jax.run.meta import META_SCHEMA, write_sizes
from gpt_jax.run.mirror import opening_workdir
from gpt_jax.run.notes import describe_batches
from gpt_jax.run.parts import Parts
from gpt_jax.run.progress import Progress
from gpt_jax.run.resume import start_state, state_items
from gpt_jax.train import (
    CHECKPOINT_FOLDER,
    NOWHERE,
    Checkpoints,
    Outlet,
    TrainState,
    open_checkpoints,
)


def run_training(
    parts: Parts,
    workdir: str | Path,
    profile: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
    origin: Mapping[str, str] = MappingProxyType({}),
    outlet: Outlet = NOWHERE,
) -> Summary | None:
    """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Returns the numbers on process 0. `profile` is the (first, last) step of a trace in
    `workdir`/profile. `origin` has facts for the report, see `Progress`. Finished checkpoints go to
    `outlet` as well. A workdir at a URL is opened by `opening_workdir`.

    Raises Stopped, once everything is saved, after a SIGTERM, a SIGUSR1 or Ctrl-C. Raises Busy if
    another run has the workdir. Raises Diverged, DataError, SaveFailed, NoCheckpoint and
    UsageError.
    """
    if is_remote(workdir):
        with opening_workdir(workdir, parts.config.checkpoint, say) as (folder, outlet, say):
            return run_training(parts, folder, profile, say, origin, outlet)

    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for note in parts.notes:
        say(note)

    hang_minutes = parts.config.train.hang_minutes
    with only_run(workdir, say):
        with jax.set_mesh(parts.mesh), watchdog(hang_minutes) as beat, ExitStack() as closing:
            collect = closing.enter_context(collecting_by_step())
            session = begin(parts, workdir, profile, say, origin, beat, closing, outlet)
            summary = train(session, profile, collect, beat, say)
        # Nothing beats while a large model is written, so no watchdog stands beside it.
        last = max(parts.config.train.steps, session.progress.start)

        def finish_exports():
            session.exporter.finish(last)
            session.checkpoints.release()

        agree_on(finish_exports)
    return summary


def train(session: "Session", profile, collect, beat, say) -> Summary | None:
    """All steps that are left, and the end of the run. Returns the numbers on process 0."""
    progress, checkpoints, exporter, stream, stop, state = session
    for step in range(progress.start + 1, progress.config.train.steps + 1):
        with progress.clock.phase("data", blocked=True):
            columns = next(stream)
        state = one_step(progress, state, step, columns, profile)
        beat()
        checkpoints.check()
        exporter.check()
        follow_step(progress, checkpoints, state, step, stop)
        collect(step)
        beat()
    return conclude(progress, checkpoints, state, stop, say)


class Session(NamedTuple):
    """What one start of a run opens, and its first state."""

    progress: Progress
    checkpoints: Checkpoints
    exporter: Exporter
    stream: Stream
    stop: StopRequest
    state: TrainState


def begin(
    parts: Parts,
    workdir: Path,
    profile,
    say,
    origin: Mapping[str, str],
    beat,
    closing: ExitStack,
    outlet: Outlet = NOWHERE,
) -> Session:
    """Opens the checkpoints, the stream and the writers, and makes the first state.

    `closing` closes all of them. Raises UsageError if the checkpoint there is of another run.
    """
    config = parts.config
    stop = StopRequest()
    closing.callback(stop.close)
    checkpoints = open_checkpoints(
        workdir / CHECKPOINT_FOLDER, config.checkpoint, say, beat, META_SCHEMA, outlet
    )
    # A save in flight would wait for a peer that has left.
    closing.push(lambda kind, error, trace: None if is_peer_gone(error) else checkpoints.close())
    exporter = open_exporter(config, checkpoints, workdir, say, closing)
    start = checkpoints.latest or 0
    check_profile(profile, start)

    heldout = heldout_batches(parts)
    sets = set_batches(parts)
    started = start_state(parts, checkpoints, say)
    sizes = started.sizes
    if started.frozen is not None:
        parts = parts._replace(frozen=started.frozen)
    if checkpoints.latest is not None:
        exporter.catch_up(checkpoints.latest)
    beat()
    rows_of = partial(sharding.process_rows, parts.mesh)
    stream = make_ramp_stream(parts.examples, sizes, rows_of, start, config.train.steps)
    closing.callback(stream.close)

    is_resumed = checkpoints.latest is not None
    origin = {**origin, "changed": ", ".join(started.changed)}
    texts = heldout, sets, stream.shares
    about = origin, started.lineage, sizes, started.carried, started.base
    progress = Progress(parts, workdir, start, is_resumed, beat, *texts, say, *about)
    closing.callback(progress.writers.close)
    if jax.process_index() == 0:
        prepare_workdir(workdir, config, start)
    for line in (progress.peak.line, *describe_batches(config, sizes, start), *stream.summary):
        say(line)
    return Session(progress, checkpoints, exporter, stream, stop, started.state)


def prepare_workdir(workdir: Path, config: configs.Config, start: int) -> None:
    """Writes config.json, and removes the report of a session that stopped at `start`.

    With that report `conclude` would think that the run had finished.
    """
    save_file(workdir / "config.json", configs.to_json(config).encode())
    if start < config.train.steps:
        report = workdir / "report.html"
        with saving(report):
            report.unlink(missing_ok=True)


def check_profile(profile: tuple[int, int] | None, start: int) -> None:
    """Raises UsageError if the profiled steps are behind a resumed run."""
    if profile and profile[0] <= start:
        raise UsageError(
            f"--profile={profile[0]}:{profile[1]}: this run goes on at step {start + 1}; start "
            "there or later"
        )


def follow_step(progress: Progress, checkpoints, state: TrainState, step: int, stop) -> None:
    """What is due after update `step`: evaluation, samples, a checkpoint.

    Raises Stopped if somebody has asked to stop. Only the checkpoint is written first, because
    a scheduler kills soon after its signal.
    """
    config = progress.config
    last = config.train.steps
    is_stopping = stop()
    if is_stopping:
        progress.end = step
    elif is_due(config.eval.every_steps, step) or step == last:
        # If a stop cuts the evaluation short, the step is already logged, so `progress.end` stays.
        is_stopping = not evaluate(progress, state, step, stop)

    if is_stopping:
        save(progress, checkpoints, state, step)
        raise stopped(progress, checkpoints, step)
    has_samples = config.eval.samples > 0
    if has_samples and is_due(config.eval.sample_every_steps, step) and step < last:
        write_samples(progress, state, step, 1)
    if checkpoints.should_save(step, metrics_at(progress, step)) or step == last:
        save(progress, checkpoints, state, step)


def stopped(progress: Progress, checkpoints, step: int) -> Stopped:
    """Writes everything, and returns what a run raises that stops on request after `step`."""
    with progress.clock.phase("checkpoint", blocked=True):
        checkpoints.wait()
    finish(progress, step)
    return Stopped(
        f"stopped on request after step {step} of {progress.config.train.steps}, saved in "
        f"{checkpoints.directory}; the same command goes on from there"
    )


def is_due(every: int, step: int) -> bool:
    """Whether something is due after `step` that is done every so many steps, or never (0)."""
    return every > 0 and step % every == 0


def one_step(progress: Progress, state: TrainState, step: int, columns, profile) -> TrainState:
    """Dispatches update `step` and handles the sums of the one before."""
    parts = progress.parts
    _, _, size, pieces = progress.sizes.level(step - 1)
    # Each batch shape is a program, which stays when the shape comes back.
    is_compiled = (size, pieces) not in progress.compiled
    if is_compiled:
        progress.compiled.add((size, pieces))
        progress.settle()  # Compiling is no part of the rate of the steps before.
    if profile and step == profile[0]:
        jax.profiler.start_trace(str(progress.workdir / "profile"))
    with progress.clock.phase("data"):
        batch = sharding.to_devices(parts.mesh, columns, size * pieces)
    began = time.perf_counter()
    with progress.clock.phase("compile" if is_compiled else "step"):
        state, sums = parts.train_step(state, batch, parts.frozen)
        if is_compiled:
            jax.block_until_ready(sums)
            progress.restart_rate(step)
    dispatched = time.perf_counter()
    with progress.clock.phase("step", blocked=True):
        late = progress.late.push(step, sums)
    fetched = time.perf_counter()
    # If dispatching waits for the device, as on CPUs, the step before was over when it began.
    is_waiting = dispatched - began > fetched - dispatched
    progress.record(late, began if is_waiting else fetched)
    if profile and step == profile[1]:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        progress.say(f"trace of steps {profile[0]} to {step}: {progress.workdir / 'profile'}")
    return state


def metrics_at(progress: Progress, step: int) -> dict[str, float]:
    """What an evaluation has measured after `step`; {} if the last one was at another step."""
    evaluated_at, metrics = progress.evaluated
    return metrics if evaluated_at == step else {}


def save(progress: Progress, checkpoints, state: TrainState, step: int) -> None:
    """Starts an asynchronous checkpoint with all that evaluation, generation and resuming need."""
    progress.settle()
    with progress.clock.phase("checkpoint"):
        meta = {
            "config": configs.to_dict(progress.config),
            "tokenizer": progress.parts.data.tokenizer.to_json(),
            "data": {
                "next": step,
                "content": progress.parts.data.content,
                "sets": dict(progress.parts.data.set_digests),
                **write_sizes(progress.sizes, step, progress.config.train),
            },
            "lineage": progress.lineage,
            "tasks": [note.to_json() for note in progress.parts.data.tasks],
        }
        if progress.base is not None:
            meta["base"] = progress.base
        metrics = metrics_at(progress, step)
        files = {f"{CARRIED_FOLDER}/{name}": raw for name, raw in progress.carried.items()}
        checkpoints.save(step, meta=meta, metrics=metrics, files=files, **state_items(state))
    progress.saved = step
    progress.restart_rate(step)


def finish(progress: Progress, step: int, **facts) -> Summary | None:
    """Makes loss.png and report.html of what metrics.jsonl holds by now, on process 0."""
    # If nothing was trained, the times are those of the run that did.
    if step > progress.start:
        progress.writers.write(step, progress.times())
    if jax.process_index() != 0:
        return None

    rows = read_jsonl(progress.workdir / "metrics.jsonl")
    summary = summarize(rows, parameters=progress.counts["total"], peak=progress.peak.line, **facts)
    kind = progress.parts.mesh.devices.flat[0].device_kind
    write_report(
        progress.workdir,
        title=progress.workdir.name,
        summary=summary,
        samples=find_samples(rows),
        versions={"device": f"{progress.parts.mesh.size} x {kind}"} | library_versions(),
    )
    return summary


def find_leftovers(workdir: Path, step: int, is_heldout: bool, samples: int) -> list[bool]:
    """Whether a finished run has its last evaluation, its last samples, and its report.

    An evaluation is expected if text is held out, and so many `samples`.
    """
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["step"] == step]
    keys = {key for row in rows for key in row}
    is_sampled = not samples or f"sample/{samples - 1}" in keys
    is_measured = not is_heldout or any(key.startswith("eval/") for key in keys)
    return [is_measured, is_sampled, (workdir / "report.html").exists()]


def conclude(
    progress: Progress, checkpoints, state: TrainState, stop: Callable[[], bool], say
) -> Summary | None:
    """The end of a run that got to its last step: samples, the report, and where everything is.

    Nothing is made again that an earlier start of the run has made.
    """
    config = progress.config
    workdir = progress.workdir
    steps = max(config.train.steps, progress.start)
    samples = config.eval.samples
    has_text = bool(progress.heldout or progress.sets)
    is_heldout = has_text and "heldout" in config.eval.evaluators
    is_measured, is_sampled, has_report = agree_on(
        lambda: find_leftovers(workdir, steps, is_heldout, samples)
    )
    if progress.start >= steps and is_measured and is_sampled and has_report:
        say(
            f"finished before, at step {steps}: see {workdir / 'report.html'}; for more steps "
            "raise config.train.steps"
        )
        return None

    if not is_measured and not evaluate(progress, state, steps, stop):
        raise stopped(progress, checkpoints, steps)
    if not is_sampled:
        write_samples(progress, state, steps, samples)
    with progress.clock.phase("checkpoint", blocked=True):
        checkpoints.wait()

    facts = {}
    if config.eval.compare_xz and jax.process_index() == 0:
        facts["xz_bits_per_byte"] = measure_xz_bits_per_byte(progress.parts.data)
    summary = finish(progress, steps, **facts)
    if summary is not None:
        where = {
            "checkpoints": checkpoints.directory,
            "metrics": workdir / "metrics.jsonl",
            "loss curve": workdir / "loss.png",
            "report": workdir / "report.html",
        }
        for line in format_summary(summary, where):
            say(line)
        if summary.mfu_full and summary.mfu_full > 1:
            say(
                "MFU is above 100 %, so it is wrong: the peak was measured at the start, beside "
                "other load; run again on an idle machine"
            )
    return summary
