"""The one loop: trains the parts of a run to its last step (floor 3; called by the train command).

All processes of a job execute the same lines; only process 0 writes and prints. Another kind of
loop is a file beside this one, on the same parts.
"""

import fcntl
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.cluster import StopRequest, agree_on, is_peer_gone, watchdog
from gpt_jax.data import EvalBatches, make_eval_batches, make_stream
from gpt_jax.errors import Stopped, UsageError
from gpt_jax.evals import (
    average_by_source,
    compute_heldout_metrics,
    draw_samples,
    measure_xz_bits_per_byte,
    sum_heldout,
)
from gpt_jax.metrics import (
    Summary,
    find_samples,
    format_summary,
    library_versions,
    read_jsonl,
    save_file,
    summarize,
    write_report,
)
from gpt_jax.run.parts import Parts
from gpt_jax.run.progress import Progress, check_finite
from gpt_jax.run.resume import start_state, state_items
from gpt_jax.train import CHECKPOINT_FOLDER, TrainState, open_checkpoints


def run_training(
    parts: Parts,
    workdir: str | Path,
    profile: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one;
    returns the numbers.

    `profile`: (first, last) step of a trace in `workdir`/profile. Raises Stopped after a SIGTERM
    or SIGUSR1 (saved), Diverged, DataError, SaveFailed, NoCheckpoint, UsageError."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config, mesh = parts.config, parts.mesh
    train, rows = config.train, sharding.process_rows(mesh, config.train.batch_size)
    for note in parts.notes:
        say(note)
    with jax.set_mesh(mesh), watchdog(train.hang_minutes) as beat, ExitStack() as closing:
        closing.enter_context(only_run(workdir, say))
        stop = StopRequest()
        closing.callback(stop.close)
        checkpoints = open_checkpoints(workdir / CHECKPOINT_FOLDER, config.checkpoint, say)
        # A save in flight would wait for a peer that has left.
        closing.push(
            lambda kind, error, trace: None if is_peer_gone(error) else checkpoints.close()
        )
        start = checkpoints.latest or 0
        if profile and profile[0] <= start:
            raise UsageError(
                f"--profile={profile[0]}:{profile[1]}: this run goes on at step {start + 1}; start "
                "there or "
                "later"
            )
        stream = make_stream(parts.examples, train.batch_size, rows, start, train.steps)
        closing.callback(stream.close)
        heldout = heldout_batches(parts)
        state = start_state(parts, checkpoints, say)
        if jax.process_index() == 0:
            save_file(workdir / "config.json", configs.to_json(config).encode())
        progress = Progress(
            parts, workdir, start, checkpoints.latest is not None, beat, heldout, stream.shares, say
        )
        closing.callback(progress.writers.close)
        if start < train.steps and jax.process_index() == 0:
            (workdir / "report.html").unlink(
                missing_ok=True
            )  # of an earlier stop: `conclude` takes it for the end's
        say(progress.peak.line)
        for line in stream.summary:
            say(line)
        for step in range(start + 1, train.steps + 1):
            with progress.clock.phase("data", blocked=True):
                columns = next(stream)
            state = one_step(progress, state, step, columns, profile)
            beat()
            checkpoints.check()
            stopping = stop()
            progress.end = step if stopping else progress.end
            if not stopping and (due(config.eval.every_steps, step) or step == train.steps):
                # Cut short by a stop it has recorded the step already: `progress.end` would come
                # too late for it.
                stopping = not evaluate(progress, state, step, stop)
            if stopping:  # nothing else comes before: who asks may not wait long
                save(progress, checkpoints, state, step)
                raise stopped(progress, checkpoints, step)
            if due(config.eval.sample_every_steps, step) and step < train.steps:
                write_samples(progress, state, step, 1)
            if checkpoints.should_save(step) or step == train.steps:
                save(progress, checkpoints, state, step)
            beat()
        return conclude(progress, checkpoints, state, stop, say)


def stopped(progress: Progress, checkpoints, step: int) -> Stopped:
    """What a run ends with that stops on request after `step`, once everything is written."""
    with progress.clock.phase("checkpoint", blocked=True):
        checkpoints.wait()
    finish(progress, step)
    return Stopped(
        f"stopped on request after step {step} of {progress.config.train.steps}, saved in "
        f"{checkpoints.directory}; the same command goes on from there"
    )


def heldout_batches(parts: Parts) -> dict[str, EvalBatches]:
    """By source: all held-out batches or the first few, as config.eval says. UsageError for too
    little."""
    config = parts.config
    rows = sharding.process_rows(parts.mesh, config.eval.batch_size)
    return {
        name: make_eval_batches(
            tokens,
            parts.data.tokenizer,
            config.data,
            config.train.seq_len,
            config.eval.batch_size,
            rows,
            config.eval.batches,
            f"the held-out text of source {name}",
        )
        for name, tokens in parts.data.heldout.items()
    }


@contextmanager
def only_run(workdir: Path, say):
    """Holds the workdir for this run alone; UsageError on all processes when another run has it."""
    with ExitStack() as closing:

        def take():
            try:
                fcntl.flock(
                    closing.enter_context(open(workdir / ".lock", "a")),
                    fcntl.LOCK_EX | fcntl.LOCK_NB,
                )
            except BlockingIOError:
                raise UsageError(
                    f"--workdir={workdir}: another run is training into it; wait for it, stop it, "
                    "or choose "
                    "another --workdir"
                ) from None
            except OSError as error:  # a file system without locks
                say(
                    f"{workdir} cannot be locked ({error.strerror}): a second run in it would not "
                    "be noticed"
                )

        agree_on(take)
        yield


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def one_step(progress: Progress, state: TrainState, step: int, columns, profile) -> TrainState:
    """Dispatches update `step` and handles the sums of the one before."""
    parts, first = progress.parts, step == progress.start + 1
    if profile and step == profile[0]:
        jax.profiler.start_trace(str(progress.workdir / "profile"))
    with progress.clock.phase("data"):
        batch = sharding.to_devices(parts.mesh, columns, progress.config.train.batch_size)
    with progress.clock.phase("compile" if first else "step"):
        state, sums = parts.train_step(state, batch)
        if first:
            jax.block_until_ready(sums)
            progress.restart_rate(step)
    with progress.clock.phase("step", blocked=True):
        late = progress.late.push(step, sums)
    progress.record(late)
    if profile and step == profile[1]:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
    return state


def settle(progress: Progress) -> None:
    """Waits for the last dispatched step and records it, so that what follows is timed and
    ordered by itself."""
    with progress.clock.phase("step", blocked=True):
        late = progress.late.flush()
    progress.record(late)


def averaged_params(progress: Progress, state: TrainState):
    """The averaged weights where the run keeps them, else the current ones."""
    return state.ema if progress.config.train.ema else state.params


def evaluate(progress: Progress, state: TrainState, step: int, stop: Callable[[], bool]) -> bool:
    """Held-out metrics after update `step`. False when `stop`, asked at each batch, has cut it
    short: all of the held-out text may take longer than who asks will wait."""
    settle(progress)
    if progress.heldout:

        def sums(batches):
            return sum_heldout(
                progress.parts.eval_step,
                averaged_params(progress, state),
                watched(batches, progress.beat, stop),
                progress.parts.mesh,
                progress.config.eval.batch_size,
            )

        try:
            with progress.clock.phase("eval"):
                found = {
                    name: compute_heldout_metrics(sums(batches))
                    for name, batches in progress.heldout.items()
                }
        except CutShort:
            return False
        found = average_by_source(found, progress.shares(step))
        check_finite("held-out loss", found["eval/loss"], step)
        progress.evaluated = step, found
        progress.writers.write(step, found)
    progress.restart_rate(step)
    return True


class CutShort(Exception):
    """Somebody has asked to stop."""


def watched(batches, beat: Callable[[], None], stop: Callable[[], bool]):
    """`batches`, telling the watchdog at each that the run is alive, and asking whether to go on
    (CutShort)."""
    for batch in batches:
        beat()
        if stop():
            raise CutShort
        yield batch


def write_samples(progress: Progress, state: TrainState, step: int, count: int) -> None:
    """`count` samples, into the writers."""
    settle(progress)
    with progress.clock.phase("sample"):
        texts = draw_samples(
            progress.config.model,
            progress.config.compute,
            averaged_params(progress, state),
            progress.parts.data.tokenizer,
            progress.config.eval,
            (progress.config.seed + step) % 2**32,
            count,
        )
    for i, text in enumerate(texts):
        progress.writers.text(step, f"sample/{i}", text)
    progress.restart_rate(step)


def save(progress: Progress, checkpoints, state: TrainState, step: int) -> None:
    """Starts an asynchronous checkpoint of everything that evaluating, generating and resuming
    need."""
    settle(progress)
    with progress.clock.phase("checkpoint"):
        meta = {
            "config": configs.to_dict(progress.config),
            "tokenizer": progress.parts.data.tokenizer.to_json(),
            "data": {"next": step, "content": progress.parts.data.content},
        }
        at, found = progress.evaluated
        checkpoints.save(step, meta=meta, metrics=found if at == step else {}, **state_items(state))
    progress.restart_rate(step)


def finish(progress: Progress, step: int, **facts) -> Summary | None:
    """loss.png and report.html from what metrics.jsonl holds by now (process 0)."""
    if (
        step > progress.start
    ):  # else nothing was trained, and the times are those of the run that did
        progress.writers.write(step, progress.clock.metrics())
    if jax.process_index() != 0:
        return None
    rows = read_jsonl(progress.workdir / "metrics.jsonl")
    summary = summarize(
        rows,
        parameters=progress.counts["total"],
        peak=progress.peak.line,
        wall_seconds=time.perf_counter() - progress.began,
        **facts,
    )
    kind = progress.parts.mesh.devices.flat[0].device_kind
    write_report(
        progress.workdir,
        title=progress.workdir.name,
        summary=summary,
        samples=find_samples(rows),
        versions={"device": f"{progress.parts.mesh.size} x {kind}"} | library_versions(),
    )
    return summary


def conclude(
    progress: Progress, checkpoints, state: TrainState, stop: Callable[[], bool], say
) -> Summary | None:
    """The end of a run that got to its last step: three samples, the report, and where
    everything is. What a run that was already there has is not made again."""
    config, steps = progress.config, max(progress.config.train.steps, progress.start)

    def found():
        keys = {
            key
            for row in read_jsonl(progress.workdir / "metrics.jsonl")
            if row["step"] == steps
            for key in row
        }
        return [
            "eval/loss" in keys,
            "sample/2" in keys,
            (progress.workdir / "report.html").exists(),
        ]

    measured, sampled, page = agree_on(found)
    if progress.start >= steps and sampled and page:
        say(
            f"finished before, at step {steps}: see {progress.workdir / 'report.html'}; for more "
            "steps raise "
            "config.train.steps"
        )
        return None
    if not measured and not evaluate(progress, state, steps, stop):
        raise stopped(progress, checkpoints, steps)
    if not sampled:
        write_samples(progress, state, steps, 3)
    with progress.clock.phase("checkpoint", blocked=True):
        checkpoints.wait()
    facts = {}
    if config.eval.compare_xz and jax.process_index() == 0:
        facts["xz_bits_per_byte"] = measure_xz_bits_per_byte(progress.parts.data)
    summary = finish(progress, steps, **facts)
    if summary is not None:
        names = {
            "checkpoints": checkpoints.directory,
            "metrics": "metrics.jsonl",
            "loss curve": "loss.png",
            "report": "report.html",
        }
        for line in format_summary(
            summary, {name: progress.workdir / path for name, path in names.items()}
        ):
            say(line)
    return summary
