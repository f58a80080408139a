"""Shards compared with their SHA-256 while a run reads them.

Whoever replaces a shard by another of the same size would else train on it unnoticed. A corpus may
take hours to hash, so a thread does it beside the run, and remembers what it has found whole. A
little is hashed at once. Each process of a job looks at its share of the shards.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpt_jax.data.tokens.hashes import (
    SETTLED_NS,
    digest_paths,
    list_facts,
    read_stamps,
    save_stamps,
)
from gpt_jax.data.tokens.shards import TokenFile, Tokens
from gpt_jax.errors import DataError
from gpt_jax.files import hash_file

AT_ONCE = 64e6  # bytes that are hashed before the first batch, which takes 0.05 s
WATCH_SECONDS = 30.0  # between two looks at the times of all shards


class Closed(Exception):
    """The guard was closed while it was hashing."""


def share_files(sides: Iterable[Tokens], part: int, parts: int) -> list[TokenFile]:
    """The files with a known SHA-256 that process `part` of `parts` looks at."""
    files = [file for tokens in sides for file in (*tokens.shards, *tokens.learn)]
    known = [file for file in files if isinstance(file, TokenFile) and file.sha256]
    return list(dict.fromkeys(known))[part::parts]


class Guard:
    """Looks at files until it is closed. `root` is the folder of the cache.

    Raises DataError if a file that is hashed at once has other content.
    """

    def __init__(self, files: Sequence[TokenFile], root: Path):
        self.files = files
        self.memory = root / f"{digest_paths(str(file.path) for file in files)}.verified"
        # Facts and SHA-256 of files that were found whole.
        self.whole = read_stamps(self.memory)
        self.failure: DataError | None = None
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None
        if not files:
            return

        if sum(file.size * file.dtype.itemsize for file in self._list_unknown()) <= AT_ONCE:
            self._look()
            self.check()
        self.thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises DataError if a file was found that has other content."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        if self.thread is not None:
            self.thread.join()

    def _watch(self) -> None:
        with contextlib.suppress(Closed):
            while self.failure is None:
                self._look(is_beside=True)
                if self.closed.wait(WATCH_SECONDS):
                    return

    def _list_unknown(self) -> list[TokenFile]:
        """The files that have not been found whole as they are now.

        A file that is not there is left to its reader, who names it.
        """
        unknown = []
        for file in self.files:
            with contextlib.suppress(OSError):
                facts = list_facts(file.path)
                if self.whole.get(str(file.path)) != [*facts, file.sha256]:
                    unknown.append(file)
        return unknown

    def _look(self, is_beside: bool = False) -> None:
        """Hashes what is unknown. A thread beside a run rests for as long as it has worked."""
        unknown = self._list_unknown()
        saved = time.monotonic()
        try:
            for file in unknown:
                began = time.monotonic()
                with contextlib.suppress(OSError):
                    self._hash(file)
                if self.failure is not None:
                    return
                if time.monotonic() - saved > WATCH_SECONDS:
                    saved = time.monotonic()
                    self._save()
                if is_beside and self.closed.wait(time.monotonic() - began):
                    raise Closed
        finally:
            if unknown:
                self._save()

    def _save(self) -> None:
        """Remembers what is whole, unless a change can hide in the grain of the clock."""
        now = time.time_ns()
        settled = {}
        for file in self.files:
            entry = self.whole.get(str(file.path))
            if entry and now - entry[2] > SETTLED_NS:
                settled[str(file.path)] = entry
        save_stamps(self.memory, settled)

    def _hash(self, file: TokenFile) -> None:
        """Notes whether a file is whole. Raises OSError, and Closed."""

        def check_open(size: int) -> None:
            if self.closed.is_set():
                raise Closed

        facts = list_facts(file.path)
        if hash_file(file.path, check_open) == file.sha256:
            self.whole[str(file.path)] = [*facts, file.sha256]
            return
        self.failure = DataError(
            f"{file.path}: its checksum is wrong, so it was damaged or replaced since it was "
            "written; look at a prepared folder with gpt-jax prepare --verify and copy it again, "
            "or delete a cache and it is built again"
        )
