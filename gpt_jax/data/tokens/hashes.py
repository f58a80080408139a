"""SHA-256 of input files, remembered for files that have not changed.

The hashes lie in the cache folder, beside sizes and times, one list for each set of files.
"""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import HUB, Source
from gpt_jax.errors import UsageError
from gpt_jax.files import digest_file
from gpt_jax.schema import Each, read_json

# A file that is younger than this is hashed again the next time, because a change may hide in the
# grain of the clock.
SETTLED_NS = 2_000_000_000
# {path: [size, time, inode, SHA-256]}
STAMPS_SCHEMA = Each(("count", "number", "count", "text"))


def hash_sources(sources: tuple[Source, ...], root: Path, workers: int) -> list[str]:
    """SHA-256 of every file, in order.

    A file whose size and time are those of the last hashing is not read again, unless it was
    younger than SETTLED_NS. A remote file is always read. Raises UsageError for a file that cannot
    be read, and for a data set of the hub.
    """
    paths = [_spell_path(source.path) for source in sources]
    name = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:16]
    stamps = root / f"{name}.stamps"
    known = {}
    with contextlib.suppress(OSError, ValueError):  # a lost or torn list costs one more hashing
        known = read_json(stamps.read_bytes(), STAMPS_SCHEMA)

    now = time.time_ns()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        rows = pool.map(lambda path: _hash(path, known.get(path), now), paths)
        entries = dict(zip(paths, rows, strict=True))

    settled = {path: entry for path, entry in entries.items() if now - entry[1] > SETTLED_NS}
    if settled != known:
        _save(stamps, settled, now)
    return [entries[path][3] for path in paths]


def _spell_path(path: Path | str) -> str:
    """A path by which a file is known: a URL, or a local path without links."""
    return path if isinstance(path, str) else str(path.resolve())


def _hash(path: str, known: list | None, now: int) -> list:
    """[size, time, inode, SHA-256] of a file; `known` if the first three are still the same."""
    if path.startswith(HUB):
        raise UsageError(
            f"{path}: a data set has no files to know a cache by; run gpt-jax prepare "
            f"--input={path} --output=DIR first, and give DIR"
        )
    try:
        if remote.is_remote(path):
            digest = hashlib.sha256()
            with remote.open_remote(path) as file:
                while block := file.read(1 << 18):
                    digest.update(block)
            return [0, now, 0, digest.hexdigest()]  # as young as can be, so never remembered

        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if known and known[:3] == stamp:
            return known
        return [*stamp, digest_file(Path(path)).sha256]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None


def _save(stamps: Path, entries: dict[str, list], now: int) -> None:
    """Replaces a list of stamps.

    A cache that is finished may be read-only, so OSError is passed over. Building one would fail
    with a message.
    """
    with contextlib.suppress(OSError):
        stamps.parent.mkdir(parents=True, exist_ok=True)
        temporary = stamps.with_suffix(f".{os.getpid()}-{now}")
        temporary.write_text(json.dumps(entries))
        os.replace(temporary, stamps)
