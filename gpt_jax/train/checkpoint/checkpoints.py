"""Saves the checkpoints of a run and deletes those that its policy no longer wants.

The folder `<workdir>/checkpoints/<step>/` has these entries, written in this order:

- `params/` and, with averaging, `ema/`. Evaluating reads nothing else.
- `train/`: the optimiser state and the step.
- `meta.json`: the step and the metrics, and what the caller adds, such as the config, the position
  in the data and the tokenizer.
- `manifest.json`, see manifest.py. It is written when all else is on disk.

Orbax's free functions write the arrays, as arrays.py describes. Policies and deletion are our own,
because they must agree with the manifest, and because Orbax's manager raises its first failure
again and again.
"""

import concurrent.futures
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jax
from orbax.checkpoint.experimental import v1 as ocp

from gpt_jax import config
from gpt_jax.cluster import agree_on, is_peer_gone
from gpt_jax.errors import Exit, PeerFailed, SaveFailed
from gpt_jax.files import free_name, replace_file, write_file
from gpt_jax.schema import Schema
from gpt_jax.train.checkpoint.arrays import nest
from gpt_jax.train.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    META,
    NOTHING_MORE,
    SAVING,
    TEMPORARY,
    cause_of,
    find_damage,
    latest_valid,
    steps_in,
    write_manifest,
)
from gpt_jax.train.checkpoint.outlet import NOWHERE, Outlet, wait_for
from gpt_jax.train.checkpoint.policy import find_best, look_at_clock, to_keep
from gpt_jax.train.checkpoint.remains import DELETED, read_metric, sweep
from gpt_jax.train.checkpoint.verify import idle

DAMAGED = ".damaged"
# What no evaluation gives.
NO_METRICS: Mapping[str, float] = MappingProxyType({})
NO_FILES: Mapping[str, bytes] = MappingProxyType({})

# Of an array that lies on several devices whole, each writes a part of at least this size. Orbax
# compiles a program for each part, 64 of them for a tiny model on 8 devices.
LEAST_PART_BYTES = 2**20


def _saving_options() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = LEAST_PART_BYTES
    return context


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for a record of Orbax.

    Orbax logs each failure with tracebacks before it raises it. Our one line about the exception
    is enough.
    """
    return f"{os.sep}orbax{os.sep}" not in record.pathname


class Reader(Protocol):
    """Somebody who reads checkpoints of a run while it is training, on process 0."""

    def take(self, step: int) -> None: ...  # hears that a checkpoint is whole
    def held(self) -> set[int]: ...  # the steps that are being read, and must stay


class Checkpoints:
    """The checkpoints of a run that is training, made by `open_checkpoints`.

    Every process calls the same methods at the same steps. `latest` is the newest step that was
    valid at the start, or None for a fresh run. `reader` may be set before the first save.
    """

    def __init__(
        self,
        directory: Path,
        policy: config.Checkpoint,
        report,
        latest: int | None,
        meta_schema: Schema = NOTHING_MORE,
        outlet: Outlet = NOWHERE,
        beat: Callable[[], None] = idle,
    ):
        self._outlet = outlet
        self._beat = beat
        self.directory = directory
        self.policy = policy
        self.latest = latest
        self._report = report
        self._meta_schema = meta_schema
        # With one worker a save is written before it is sealed.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple | None = None  # (step, written, sealed) of the save in flight
        self._started: dict[int, float | None] = {}  # that save's value of `best_metric`

        self.reader: Reader | None = None
        self._held: set[int] = set()  # the reader's steps at the last save
        self._saved_step = latest or 0
        self._saved_at = time.monotonic()
        self._next_look = 0

        # Steps newer than `latest` are damaged. They do not count as kept, and are not deleted.
        self._complete = outlet.metrics | {
            step: read_metric(directory, step, policy)
            for step in steps_in(directory)
            if latest is not None and step <= latest and (directory / str(step) / MANIFEST).exists()
        }

    def should_save(self, step: int, metrics: Mapping[str, float] = NO_METRICS) -> bool:
        """Whether the policy wants a checkpoint after `step`. All processes get the same answer.

        `metrics` are those of an evaluation after this very step. If they are among the best, the
        step is saved whatever the periods are. Otherwise `keep_best` would keep nothing where saves
        and evaluations never fall on one step.

        It asks process 0's clock only if `every_minutes` is set, and then not at every step.
        """
        if step == self._saved_step:
            return False
        if self.policy.every_steps and step % self.policy.every_steps == 0:
            return True
        if self.policy.keep_best and self.policy.best_metric in metrics:
            value = metrics[self.policy.best_metric]
            if agree_on(lambda: self._is_among_best(step, value)):
                return True
        if not self.policy.every_minutes or step < self._next_look:
            return False

        def look():
            seconds = time.monotonic() - self._saved_at
            return look_at_clock(step, self._saved_step, seconds, self.policy.every_minutes)

        is_due, self._next_look = agree_on(look)
        return is_due

    def _is_among_best(self, step: int, value: float) -> bool:
        """Whether a save of `step` would be one of the `keep_best`. Process 0 knows all saves."""
        return step in find_best({**self._complete, **self._started, step: value}, self.policy)

    def save(
        self,
        step: int,
        params,
        train,
        meta: dict,
        metrics: dict[str, float] | None = None,
        ema=None,
        files: Mapping[str, bytes] = NO_FILES,
    ) -> bool:
        """Starts saving. The buffers of the arrays may be donated when it returns.

        Returns False if a whole checkpoint of this step exists. `params`, `train` and `ema`, unless
        that is None, are pytrees of jax arrays. Each of them can be restored by itself. `meta` has
        JSON values for meta.json, where `step`, `metrics` and `format` are added. `files` are more
        files of the step, by name.

        It waits for the save before. Raises SaveFailed if that save or the start of this one fails.
        """
        self.wait()
        text = json.dumps({**meta, "step": step, "metrics": metrics or {}, "format": FORMAT})
        trees = {
            name: nest(tree, name)
            for name, tree in (("params", params), ("train", train), ("ema", ema))
            if tree is not None
        }

        self._saved_step = step
        self._saved_at = time.monotonic()
        self._next_look = step + 1
        if not agree_on(lambda: self._make_room(step)):
            return False

        try:
            with _saving_options():
                response = ocp.save_checkpointables_async(str(self.directory / str(step)), trees)
        except Exception as error:
            raise self._failed(step, error) from error
        written = self._pool.submit(response.result)
        value = (metrics or {}).get(self.policy.best_metric)
        self._started = {step: value}
        sealed = self._pool.submit(self._seal, step, written, text, value, files)
        self._pending = step, written, sealed
        return True

    def wait(self) -> None:
        """Returns when the save in flight is complete, manifest included, on all processes.

        Raises SaveFailed if that save failed.
        """
        if self._pending is None:
            return
        step, written, sealed = self._pending
        self._pending = None
        error = written.exception()
        if error is not None:
            # This error is not agreed on, because other processes may still be inside Orbax.
            sealed.result()  # After it the remains of the save are gone.
            raise self._failed(step, error) from error
        wait_for(sealed, self._outlet, self._beat)
        agree_on(sealed.result)

    def check(self) -> None:
        """Raises SaveFailed if the save in the background has failed already.

        It never blocks, and needs no other process.
        """
        self._outlet.check()
        if self._pending is not None and self._pending[2].done():
            step, written, sealed = self._pending
            if written.exception() is not None:
                raise self._failed(step, written.exception())
            sealed.result()

    def close(self) -> None:
        """Lets the save in flight end and stops the thread. It needs no other process.

        Raises SaveFailed if that save failed.
        """
        self._pool.shutdown(wait=True)
        self.check()

    def _make_room(self, step: int) -> bool:
        """Returns False if the step exists and is whole. A damaged one is moved aside.

        Process 0 does it before a save.
        """
        folder = self.directory / str(step)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)

            if folder.exists():
                damage = "" if step in self._complete else find_damage(folder, self._meta_schema)
                if not damage:
                    return False
                aside = free_name(folder.with_name(folder.name + DAMAGED))
                folder.rename(aside)
                self._report(
                    f"checkpoint step {step}: the damaged one there ({damage}) is now {aside}"
                )
            (self.directory / f"{step}{SAVING}").touch()
        except OSError as error:
            raise self._failed(step, error) from error
        return True

    def _seal(
        self,
        step: int,
        written,
        meta_text: str,
        value: float | None,
        files: Mapping[str, bytes],
    ) -> None:
        """Writes files, meta and manifest, and deletes the steps that the policy no longer wants.

        Process 0 does it in the background, after Orbax.
        """
        if jax.process_index() != 0:
            return

        folder = self.directory / str(step)
        mark = self.directory / f"{step}{SAVING}"
        if written.exception() is not None:
            self._discard(Path(f"{folder}{TEMPORARY}"))
            mark.unlink(missing_ok=True)
            return

        try:
            for name, content in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                write_file(folder / name, content)
            replace_file(folder / META, meta_text.encode())
            write_manifest(folder)
            mark.unlink(missing_ok=True)
        except OSError as error:
            if not (folder / MANIFEST).exists():
                self._discard(folder)
                mark.unlink(missing_ok=True)
            raise self._failed(step, error) from error

        self._outlet.send(step)
        self._complete[step] = value
        if self.reader is not None:
            self.reader.take(step)
            self._held = self.reader.held()
        self._prune(step)

    def release(self) -> None:
        """Deletes what stayed for the reader alone, which has read everything.

        Process 0 calls it after `close`.
        """
        if self._held:
            self._held = set()
            self._prune(max(self._complete))

    def _prune(self, newest: int) -> None:
        """Deletes the steps that the policy no longer wants, but those that are being read."""
        held = self._held
        for old in sorted(set(self._complete) - to_keep(self._complete, self.policy) - held):
            del self._complete[old]
            self._discard(self.directory / str(old))
            self._outlet.remove(old)
        # Of what was sent, the disk keeps the step that the next start resumes from.
        for old in steps_in(self.directory) if self._outlet.is_away else []:
            if old < newest and old not in held:
                self._discard(self.directory / str(old))

    def _discard(self, folder: Path) -> None:
        """Deletes a folder, which disappears from view at once.

        A failure is reported and does not make the save fail.
        """
        try:
            if folder.exists():
                doomed = folder.rename(free_name(folder.with_name(folder.name + DELETED)))
                shutil.rmtree(doomed)
        except OSError as error:
            self._report(f"{folder} could not be deleted: {cause_of(error)}")

    def _failed(self, step: int, error: BaseException) -> Exit:
        """The exception for a save that ended with `error`.

        It is PeerFailed if another process has left, and SaveFailed otherwise.
        """
        good = max((s for s in self._complete if s != step), default=None)
        rest = "there is no earlier checkpoint"
        if good is not None:
            rest = f"the checkpoint of step {good} is untouched"
        if is_peer_gone(error):
            return PeerFailed(
                f"{self.directory}: a peer process left while step {step} was being saved, "
                f"its log has the reason; {rest}"
            )

        folders = (self.directory, *self.directory.parents)
        parent = next(folder for folder in folders if folder.exists())
        free = shutil.disk_usage(parent).free / 2**20
        return SaveFailed(
            f"{self.directory}: saving step {step} failed: {cause_of(error)} "
            f"({free:,.1f} MiB free); {rest}"
        )


def open_checkpoints(
    directory,
    policy: config.Checkpoint,
    report=print,
    beat: Callable[[], None] = idle,
    meta_schema: Schema = NOTHING_MORE,
    outlet: Outlet = NOWHERE,
) -> Checkpoints:
    """The checkpoints of a run that is about to train into `directory`, `<workdir>/checkpoints`.

    It removes what a killed process left half-written and looks for the newest valid step. Process
    0 reports each removal and each damaged step in a line. Every process calls it. `beat` is
    called while files are read. Raises NoCheckpoint if there are checkpoints and none is valid.
    `meta_schema` is that of `find_damage`. Each finished step goes to `outlet` as well.
    """
    directory = Path(directory).absolute()
    logging.getLogger("absl").addFilter(_not_orbax)
    agree_on(lambda: sweep(directory, report))
    return Checkpoints(
        directory,
        policy,
        report if jax.process_index() == 0 else _silent,
        latest_valid(directory, report, beat, meta_schema),
        meta_schema,
        outlet,
        beat,
    )


def _silent(line: str) -> None:
    """Processes other than 0 say nothing."""
