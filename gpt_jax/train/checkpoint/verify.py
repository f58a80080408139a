"""Compares the files of a checkpoint with their digests, by all processes of a job together.

A checkpoint may have a terabyte, which takes one process longer than a run may stand still. So each
process hashes its part of the files, in threads. In rounds of ROUND_SECONDS all of them learn how
far the others are. The watchdog is told after a round in which somebody has read something.
"""

import concurrent.futures
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from gpt_jax.cluster import exchange
from gpt_jax.files import describe_error, hash_file

# hashlib lets go of the interpreter lock, so files are hashed in parallel.
THREADS = min(16, max(4, os.cpu_count() or 1))
ROUND_SECONDS = 5.0
# Characters of a damage that travel to the other processes.
MOST_TEXT = 200

Files = dict[str, list]  # {name: [bytes, sha256 in hexadecimal]}


class Share(NamedTuple):
    """Which of how many parts of the files a process hashes."""

    index: int
    count: int


ALL = Share(0, 1)


def own_share() -> Share:
    """The part of this process, where all processes of the job take one each."""
    return Share(jax.process_index(), jax.process_count())


def idle() -> None:
    """Takes the place of a watchdog's beat where there is no watchdog."""


def deal(files: Files, count: int) -> list[list[str]]:
    """The names in `count` parts of about equal bytes, the same parts on every process."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(files, key=lambda name: (-files[name][0], name)):
        lightest = loads.index(min(loads))
        parts[lightest].append(name)
        loads[lightest] += files[name][0]
    return parts


class Hashing:
    """Files that threads hash. Leaving its `with` statement drops those that have not begun."""

    def __init__(self, folder: Path, names):
        self.folder = folder
        self.read = dict.fromkeys(names, 0)  # name -> bytes so far
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS, "hash")
        self.digests = {name: self.pool.submit(self._hash, name) for name in self.read}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _hash(self, name: str) -> str:
        def tell(size: int) -> None:
            self.read[name] += size

        return hash_file(self.folder / name, tell)

    def bytes(self) -> int:
        """How much has been read until now."""
        return sum(self.read.values())

    def is_done(self, seconds: float | None = None) -> bool:
        """Whether all files are hashed within `seconds`, or at all for None."""
        return not concurrent.futures.wait(self.digests.values(), seconds).not_done

    def damage(self, files: Files) -> list[str]:
        """ "file: reason" for the hashed files that are not as `files` says."""
        bad = []
        for name, digest in self.digests.items():
            error = digest.exception()
            if isinstance(error, OSError):
                # A file that the disk no longer gives back is damage, too.
                bad.append(f"{name}: {describe_error(error)}")
            elif digest.result() != files[name][1]:
                bad.append(f"{name}: content changed (sha256 differs)")
        return bad


def hash_files(folder: Path, names) -> list[str]:
    """sha256 of each named file, in hexadecimal and in their order. Raises OSError."""
    with Hashing(folder, names) as hashing:
        return [digest.result() for digest in hashing.digests.values()]


def compare_files(
    folder: Path,
    files: Files,
    beat: Callable[[], None] = idle,
    share: Share = ALL,
    known: str = "",
) -> str:
    """The damage of `files` in `folder` as "file: reason", or "" if every byte is as saved.

    With `own_share()` all processes call it, hash a part each, and get the same answer. With ALL
    this process does everything. `known` is damage that this process has seen already.
    """
    mine = set(deal(files, share.count)[share.index])
    before = -1
    with Hashing(folder, [name for name in files if name in mine]) as hashing:
        while True:
            is_done = hashing.is_done(ROUND_SECONDS)
            bad = [known] if known else []
            bad += hashing.damage(files) if is_done else []
            own = {"bytes": hashing.bytes(), "done": is_done, "bad": len(bad)}
            own["first"] = bad[0][:MOST_TEXT] if bad else ""
            reports = exchange(own) if share.count > 1 else [own]

            read = sum(report["bytes"] for report in reports)
            if read > before:
                beat()
            before = read
            if all(report["done"] for report in reports):
                return summarize(reports)


def summarize(reports: list[dict]) -> str:
    """One line about the damage that the processes report, or ""."""
    count = sum(report["bad"] for report in reports)
    more = f" (and {count - 1} more files)" if count > 1 else ""
    return next((f"{report['first']}{more}" for report in reports if report["bad"]), "")
