"""The cache of tokenized text files: written, opened, proved whole, and built once (called by
cache).

A cache is a folder: a shard (see shards) for each side, `train` and `eval`, `origins.json`,
`tokenizer.json`, `meta.json`. It is built under another name and renamed when all of it is on disk,
so a kill in the middle leaves nothing that looks usable.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gpt_jax.data.read import remote
from gpt_jax.data.read.documents import Document
from gpt_jax.data.read.sources import HUB, Source
from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.shards import SIDES, Origin, TokenFile, Tokens
from gpt_jax.errors import UsageError
from gpt_jax.files import write_file

FORMAT = 3
BATCH_CHARACTERS = 1 << 23  # tokenized at once: what is held in memory


def _encoded(
    texts: Iterable[tuple[str, int, Document]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple]:
    """(side, source, document, ids, bytes lost, whether the document ends here) in order.
    Threads, not processes: the library releases the interpreter's lock, and on 2 cores two
    threads encode 5.6 MB/s where two spawned processes encode 4.4."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        batch, size = [], 0

        def encode(item: tuple) -> tuple:
            side, source, document, part, last = item
            try:
                ids = tokenizer.encode(part)
                return side, source, document, ids, tokenizer.lost(part, ids), last
            except UsageError as error:
                raise UsageError(f"{document.name}: {error}") from None

        for side, source, document in texts:
            parts = list(tokenizer.parts(document.text))
            for i, part in enumerate(parts, 1):
                batch.append((side, source, document, part, i == len(parts)))
                size += len(part)
                if size >= BATCH_CHARACTERS:
                    yield from pool.map(encode, batch)
                    batch, size = [], 0
        yield from pool.map(encode, batch)


def write(
    folder: Path,
    texts: Iterable[tuple[str, int, Document]],
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[str], None],
    sources: list[str],
    about: dict,
) -> None:
    """Fills `folder` with the tokens of `texts` (side, number of the source, document);
    `sources` are their names, `about` goes into the meta, written last."""
    dtype = shards.id_type(tokenizer.vocab)
    told, several = time.monotonic(), [False] * len(sources)
    with contextlib.ExitStack() as stack:
        sides = {side: shards.Writer(folder / side, dtype, tokenizer.eot) for side in SIDES}
        for out in sides.values():
            stack.callback(out.file.close)
        for side, source, document, ids, lost, last in _encoded(texts, tokenizer, workers):
            sides[side].write(ids, lost)
            if last:
                several[source] |= document.name != sources[source]
                sides[side].end(
                    shards.text_hash(document.text),
                    len(document.text.encode()),
                    document.row,
                    source,
                )
            if time.monotonic() - told > 10:
                told = time.monotonic()
                report(f"data: tokenized {sum(s.bytes for s in sides.values()) / 1e6:,.0f} MB")
        for out in sides.values():
            out.close()
    counts = {
        side: {
            "tokens": out.tokens,
            "documents": len(out.offsets) - 1,
            "bytes": out.bytes,
            "lost": out.lost,
        }
        for side, out in sides.items()
    }
    origins = [[name, 0, many] for name, many in zip(sources, several)]
    write_file(folder / "origins.json", json.dumps(origins).encode())
    write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "tokenizer": tokenizer.fingerprint,
        **counts,
        **about,
    }
    write_file(folder / "meta.json", json.dumps(meta, indent=1).encode())


class Unusable(Exception):
    """A cache folder that is not whole; the message says why."""


def load(folder: Path) -> tuple[dict[str, Tokens | None], Tokenizer]:
    """({side: Tokens, or None without text}, tokenizer) of a cache folder; Unusable when
    anything does not fit."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != FORMAT:
            raise Unusable(f"has format {meta['format']}, not {FORMAT}")
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text())
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise Unusable("holds another tokenizer than its meta says")
        origins = tuple(
            Origin(*origin) for origin in json.loads((folder / "origins.json").read_bytes())
        )
        return {side: _open(folder, side, meta, origins) for side in SIDES}, tokenizer
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise Unusable(f"cannot be read ({error})") from None


def _open(folder: Path, side: str, meta: dict, origins: tuple[Origin, ...]) -> Tokens | None:
    counts, file = (
        meta[side],
        TokenFile(folder / f"{side}.tokens", np.dtype(meta["dtype"]), meta[side]["tokens"]),
    )
    if (size := os.path.getsize(file.path)) != file.size * file.dtype.itemsize:
        raise Unusable(
            f"{side}.tokens has {size} bytes, its meta says {file.size * file.dtype.itemsize}"
        )
    offsets, docs = shards.open_index(folder / side, counts["documents"], file.size)
    found = Tokens(side, (file,), offsets, docs, counts["bytes"], origins, counts["lost"])
    return found if file.size else None


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]):
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"data: waiting for another process that builds {path.with_suffix('').name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # closing the file gives the lock back, and so does the end of the process, whatever ends it
        yield


def obtain(folder: Path, build: Callable[[Path], None], report: Callable[[str], None]):
    """`load(folder)`, after `build(temporary folder)` and a rename if there is no whole cache
    yet. Of several processes that ask at once, one builds and the others wait."""
    if folder.is_dir():
        with contextlib.suppress(
            Unusable
        ):  # looked at again under the lock, where the reason is reported
            return load(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), report):
        if folder.is_dir():
            try:
                return load(folder)
            except Unusable as why:
                report(f"data: the cache {folder} {why}; it is built again")
                shutil.rmtree(folder)
        building = folder.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)  # what a killed build left
        building.mkdir()
        try:
            build(building)
            os.replace(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return load(folder)


def content_hashes(sources: tuple[Source, ...], root: Path, workers: int) -> list[str]:
    """SHA-256 of every file. A file whose size and time are those of the last hashing is not
    read again, unless it was so young then that a change could have hidden in the clock's grain."""
    paths = [
        source.path if remote.is_remote(source.path) else str(source.path.resolve())
        for source in sources
    ]
    key = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:16]
    stamps = root / f"{key}.stamps"
    known = {}
    with contextlib.suppress(OSError, ValueError):  # a lost or torn list costs one more hashing
        known = json.loads(stamps.read_bytes())

    def look(path: str) -> tuple[str, list]:
        if path.startswith(HUB):
            raise UsageError(
                f"{path}: a data set has no files to know a cache by; run gpt-jax prepare --input={path} "
                "--output=DIR first, and give DIR"
            )
        try:
            if remote.is_remote(path):  # stamped as new, so that it is hashed again the next time
                with remote.open_remote(path) as file:
                    return path, [0, now, 0, hashlib.file_digest(file, "sha256").hexdigest()]
            stat = os.stat(path)
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if path in known and known[path][:3] == stamp:
                return path, known[path]
            with open(path, "rb") as file:
                return path, [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None

    now = time.time_ns()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = dict(pool.map(look, paths))
    old = {path: entry for path, entry in found.items() if now - entry[1] > 2_000_000_000}
    if old != known:
        with contextlib.suppress(
            OSError
        ):  # a finished cache may be read-only; building one fails with a message
            root.mkdir(parents=True, exist_ok=True)
            temporary = stamps.with_suffix(f".{os.getpid()}-{now}")
            temporary.write_text(json.dumps(old))
            os.replace(temporary, stamps)
    return [found[path][3] for path in paths]
