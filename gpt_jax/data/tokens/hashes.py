"""SHA-256 of input files, remembered for files that have not changed.

The hashes lie in the cache folder, beside sizes and times, one list for each set of files. Of the
times that of the last change of the inode counts too. A program can set back the time of a content,
and not that one.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import HUB, Source
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, digest_file, replacing
from gpt_jax.schema import read_json

# A file that is younger than this is hashed again the next time, because a change may hide in the
# grain of the clock.
SETTLED_NS = 2_000_000_000


def hash_remote(url: str) -> str:
    """SHA-256 of a file of a store. Raises UsageError if it cannot be read."""
    digest = hashlib.sha256()
    for block in remote.read_blocks(url):
        digest.update(block)
    return digest.hexdigest()


def locate_stamps(sources: tuple[Source, ...], root: Path) -> Path:
    """Where the hashes of a set of files are remembered."""
    return root / f"{digest_paths(_spell_path(source.path) for source in sources)}.stamps"


def digest_paths(paths: Iterable[str]) -> str:
    """16 hex digits of paths, which may hold bytes that are no UTF-8."""
    names = "\0".join(paths).encode("utf-8", "surrogateescape")
    return hashlib.sha256(names).hexdigest()[:16]


def hash_sources(
    sources: tuple[Source, ...],
    root: Path,
    workers: int,
    read_remote: Callable[[str], str] = hash_remote,
) -> list[str]:
    """SHA-256 of every file, in order.

    A file whose size, times and inode are those of the last hashing is not read again, unless it
    was younger than SETTLED_NS. A remote file is not read again if its version is sure and still
    the same. Otherwise `read_remote` gives its SHA-256. Raises UsageError for a file that cannot be
    read, and for a data set of the hub.
    """
    paths = [_spell_path(source.path) for source in sources]
    stamps = locate_stamps(sources, root)
    known = read_stamps(stamps)
    now = time.time_ns()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = pool.map(lambda path: _hash(path, known.get(path), now, read_remote), paths)
        entries = dict(zip(paths, rows, strict=True))

    settled = {path: entry for path, entry in entries.items() if now - entry[2] > SETTLED_NS}
    if settled != known:
        save_stamps(stamps, settled)
    return [entries[path][-1] for path in paths]


def _spell_path(path: Path | str) -> str:
    """A path by which a file is known: a URL, or a local path without links."""
    return path if isinstance(path, str) else str(path.resolve())


def _hash(path: str, known: list | None, now: int, read_remote: Callable[[str], str]) -> list:
    """[size, time, time of the inode, inode, SHA-256] of a file.

    It is `known` if all but the last are still the same. A remote file has its store's stamp as the
    time, and 0 as the time of the inode if that is sure. Without a sure stamp it is as young as can
    be, so it is never remembered.
    """
    if path.startswith(HUB):
        raise UsageError(
            f"{path}: a data set has no files to know a cache by; run gpt-jax prepare "
            f"--input={path} --output=DIR first, and give DIR"
        )
    try:
        if remote.is_remote(path):
            version = remote.find_version(path)
            stamp = [version.size, version.stamp, 0, 0]
            if version.sure and known and known[:-1] == stamp:
                return known
            sha256 = read_remote(path)
            if not version.sure or remote.find_version(path) != version:
                stamp[2] = now
            return [*stamp, sha256]

        stamp = list_facts(path)
        if known and known[:-1] == stamp:
            return known
        return [*stamp, digest_file(Path(path)).sha256]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None


def list_facts(path: Path | str) -> list[int]:
    """[size, time, time of the inode, inode] of a file. Raises OSError."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_stamps(stamps: Path) -> dict[str, list]:
    """What `save_stamps` wrote, without rows of another shape.

    A lost or torn list costs one more hashing, so it is empty then.
    """
    try:
        entries = read_json(stamps.read_bytes(), "object")
    except (OSError, ValueError):
        return {}
    return {path: row for path, row in entries.items() if _is_stamp(row)}


def _is_stamp(row) -> bool:
    """Whether a row has the five entries that `_hash` gives, with a number in the third place."""
    return isinstance(row, list) and len(row) == 5 and isinstance(row[2], int)


def save_stamps(stamps: Path, entries: dict[str, list]) -> None:
    """Replaces a list of stamps.

    A cache that is finished may be read-only, so OSError is passed over. Building one would fail
    with a message.
    """
    with contextlib.suppress(OSError):
        stamps.parent.mkdir(parents=True, exist_ok=True)
        with replacing(stamps) as temporary:
            temporary.write_text(json.dumps(entries))
