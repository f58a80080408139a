"""Checkpoints of a run that is training, written as directories of Hugging Face beside it.

A thread of process 0 reads a checkpoint from the disk, so devices hold nothing twice and training
goes on. It writes one directory at a time.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import jax

from gpt_jax import config as configs
from gpt_jax.cluster import agree_on
from gpt_jax.errors import SaveFailed
from gpt_jax.files import describe_error
from gpt_jax.interop import UNFINISHED
from gpt_jax.run.convert import EXPORT_FOLDER, export_step
from gpt_jax.train import MANIFEST, Checkpoints, steps_in


class Cancelled(Exception):
    """The run ends before a directory is whole. What was written of it is removed."""


class Exporter:
    """Writes each checkpoint whose step is a multiple of `checkpoint.export_every_steps`.

    `directory` is that of the checkpoints. Other processes than 0 write nothing.
    """

    def __init__(self, config: configs.Config, directory: Path, say: Callable[[str], None]):
        self._config = config
        self._directory = directory
        self._say = say
        self._pool = ThreadPoolExecutor(1, "export")
        self._pending: dict[int, Future] = {}
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # `take` comes from the thread of the checkpoints

    def take(self, step: int) -> None:
        """Writes a checkpoint that is whole, if it is due, when the ones before are written."""
        every = self._config.checkpoint.export_every_steps
        is_due = jax.process_index() == 0 and every > 0 and step % every == 0
        with self._lock:
            # A last save may become whole behind the end of the run.
            if is_due and not self._is_over.is_set():
                self._pending[step] = self._pool.submit(self._export, step)

    def catch_up(self, latest: int) -> None:
        """Writes what an earlier start of the run has left undone, up to step `latest`.

        Directories are written in the order of their steps. So only steps behind the newest one
        that is there can be missing, and not those that a person has deleted.
        """
        folder = self._directory.parent / EXPORT_FOLDER
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        newest = max(steps, default=0)
        for step in sorted(steps_in(self._directory)):
            is_whole = (self._directory / str(step) / MANIFEST).exists()
            if newest < step <= latest and is_whole:
                self.take(step)

    def held(self) -> set[int]:
        """The steps whose directories are not written yet. Their checkpoints must stay.

        Those that `close` has given up are among them, because the next start reads them.
        """
        return {step for step, future in list(self._pending.items()) if not is_written(future)}

    def check(self) -> None:
        """Raises SaveFailed if a directory could not be written. It never blocks."""
        for future in list(self._pending.values()):
            if future.done():
                future.result()

    def finish(self, last: int) -> None:
        """Returns when all directories are written, that of the `last` step too.

        Raises SaveFailed if one could not be.
        """
        for future in list(self._pending.values()):
            future.result()
        self._pool.shutdown()
        export_step(self._config, self._directory, last, self._say)

    def close(self) -> None:
        """Gives up what is not written yet. The run writes it when it is resumed."""
        with self._lock:
            self._is_over.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _export(self, step: int) -> None:
        def look() -> None:
            if self._is_over.is_set():
                raise Cancelled

        export_step(self._config, self._directory, step, self._say, look)


def is_written(future: Future) -> bool:
    """Whether a directory is whole, and was neither given up nor refused by the disk."""
    return future.done() and not future.cancelled() and future.exception() is None


def open_exporter(
    config: configs.Config, checkpoints: Checkpoints, workdir: Path, say, closing: ExitStack
) -> Exporter:
    """The exporter of a run that begins, which hears of each checkpoint.

    An error that goes through `closing` closes it. What a killed process left is removed. Raises
    SaveFailed if that cannot be.
    """
    agree_on(lambda: sweep_exports(workdir, say))
    exporter = Exporter(config, checkpoints.directory, say)
    checkpoints.reader = exporter

    def close(kind, error, trace) -> None:
        if error is not None:
            exporter.close()

    closing.push(close)
    return exporter


def sweep_exports(workdir: Path, say: Callable[[str], None]) -> None:
    """Removes what a killed process left of a directory. Raises SaveFailed if it cannot."""
    for rest in sorted((workdir / EXPORT_FOLDER).glob(f"*{UNFINISHED}")):
        try:
            shutil.rmtree(rest)
        except OSError as error:
            raise SaveFailed(f"{rest}: cannot be removed: {describe_error(error)}") from error
        say(f"{rest} was not finished, and is removed")
