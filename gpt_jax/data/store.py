"""Token files: how they are written, opened, proved whole, and built once (called by cache and rows).

A cache is a folder: `train.tokens` and `eval.tokens` (uint16 or uint32), `*.offsets` (int64: where each document
starts, then the end), `names.json`, `tokenizer.json`, `meta.json`. It is built under another name and renamed when all
of it is on disk, so a kill in the middle leaves nothing that looks usable.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np

from gpt_jax.data.sources import Source
from gpt_jax.data.tokenizer import Tokenizer, from_json
from gpt_jax.errors import DataError, UsageError

FORMAT = 1
SIDES = ("train", "eval")
BATCH_CHARACTERS = 1 << 23  # tokenized at once: what is held in memory


@dataclass(frozen=True, eq=False)
class Tokens:
    """The ids of some documents, one after the other, each ended by end of text where the tokenizer has it."""

    name: str  # train or eval
    tokens: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]: starts, then the end
    bytes: int  # of the text in UTF-8, specials not counted
    names: tuple[str, ...] = ()  # of the documents; kept for held-out text only
    file: BinaryIO | None = None  # what `tokens` maps; None: it is in memory

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def label(self) -> str:
        return self.file.name if self.file else f"the {self.name} tokens"

    def check(self) -> None:
        """DataError if the mapped file has shrunk: touching a page that is gone would kill the process with SIGBUS."""
        if self.file is None:
            return
        try:
            size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{self.label}: cannot be read any more: {error.strerror}") from None
        if size != self.tokens.nbytes:
            raise DataError(f"{self.label}: changed during the run from {self.tokens.nbytes} to {size} bytes; start "
                            "again, and it is rebuilt")


@dataclass
class _Side:
    """One pair of token and offset files as it is written."""

    file: BinaryIO
    offsets: array
    names: list[str]
    bytes: int = 0


def _encoded(texts: Iterable[tuple[str, str, str]], tokenizer: Tokenizer, workers: int) -> Iterator[tuple]:
    """(side, name, ids, whether a document ends here) in order. Threads, not processes: the library releases the
    interpreter's lock, and on 2 cores two threads encode 5.6 MB/s where two spawned processes encode 4.4."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        batch, size = [], 0

        def encode(item: tuple) -> tuple:
            side, name, part, last = item
            try:
                return side, name, tokenizer.encode(part), last
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None

        for side, name, text in texts:
            parts = list(tokenizer.parts(text))
            for i, part in enumerate(parts, 1):
                batch.append((side, name, part, i == len(parts)))
                size += len(part)
                if size >= BATCH_CHARACTERS:
                    yield from pool.map(encode, batch)
                    batch, size = [], 0
        yield from pool.map(encode, batch)


def write(folder: Path, texts: Iterable[tuple[str, str, str]], tokenizer: Tokenizer, workers: int,
          report: Callable[[str], None], about: dict) -> None:
    """Fills `folder` with the tokens of `texts` (side, name, text); `about` goes into the meta, written last."""
    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
    ending = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype)
    told = time.monotonic()
    with contextlib.ExitStack() as stack:
        sides = {side: _Side(stack.enter_context(open(folder / f"{side}.tokens", "wb")), array("q", [0]), [])
                 for side in SIDES}
        for side, name, ids, last in _encoded(texts, tokenizer, workers):
            out = sides[side]
            out.bytes += int(tokenizer.token_bytes[ids].sum())
            out.file.write(ids.astype(dtype).tobytes())
            if last:
                out.file.write(ending.tobytes())
                out.offsets.append(out.file.tell() // ending.itemsize)
                out.names.extend([name] if side == "eval" else [])
            if time.monotonic() - told > 10:
                told = time.monotonic()
                report(f"data: tokenized {sum(s.bytes for s in sides.values()) / 1e6:,.0f} MB")
        for out in sides.values():
            _sync(out.file)
    counts = {side: {"tokens": out.offsets[-1], "documents": len(out.offsets) - 1, "bytes": out.bytes}
              for side, out in sides.items()}
    for side, out in sides.items():
        _save(folder / f"{side}.offsets", out.offsets.tobytes())
    _save(folder / "names.json", json.dumps(sides["eval"].names).encode())
    _save(folder / "tokenizer.json", tokenizer.to_json().encode())
    meta = {"format": FORMAT, "dtype": np.dtype(dtype).name, "tokenizer": tokenizer.fingerprint, **counts, **about}
    _save(folder / "meta.json", json.dumps(meta, indent=1).encode())


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _save(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        _sync(file)


class Unusable(Exception):
    """A cache folder that is not whole; the message says why."""


def load(folder: Path) -> tuple[dict[str, Tokens | None], Tokenizer]:
    """({side: Tokens, or None without text}, tokenizer) of a cache folder; Unusable when anything does not fit."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != FORMAT:
            raise Unusable(f"has format {meta['format']}, not {FORMAT}")
        tokenizer = from_json((folder / "tokenizer.json").read_text())
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise Unusable("holds another tokenizer than its meta says")
        names = json.loads((folder / "names.json").read_bytes())
        return {side: _open(folder, side, meta, names if side == "eval" else ()) for side in SIDES}, tokenizer
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise Unusable(f"cannot be read ({error})") from None


def _open(folder: Path, side: str, meta: dict, names) -> Tokens | None:
    counts, dtype = meta[side], np.dtype(meta["dtype"])
    file = open(folder / f"{side}.tokens", "rb")  # stays open as long as the Tokens live, for `check`
    size = os.fstat(file.fileno()).st_size
    if size != counts["tokens"] * dtype.itemsize:
        raise Unusable(f"{side}.tokens has {size} bytes, its meta says {counts['tokens'] * dtype.itemsize}")
    offsets = np.fromfile(folder / f"{side}.offsets", np.int64)
    if len(offsets) != counts["documents"] + 1 or offsets[-1] != counts["tokens"] or (np.diff(offsets) < 0).any():
        raise Unusable(f"{side}.offsets does not fit its meta")
    if not counts["tokens"]:
        return None
    return Tokens(side, np.memmap(file, dtype, "r").view(np.ndarray), offsets, counts["bytes"], tuple(names), file)


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]):
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"data: waiting for another process that builds {path.with_suffix('').name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, and so does the end of the process, whatever ends it


def obtain(folder: Path, build: Callable[[Path], None], report: Callable[[str], None]):
    """`load(folder)`, after `build(temporary folder)` and a rename if there is no whole cache yet. Of several processes
    that ask at once, one builds and the others wait."""
    if folder.is_dir():
        with contextlib.suppress(Unusable):  # looked at again under the lock, where the reason is reported
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
    """SHA-256 of every file. A file whose size and time are those of the last hashing is not read again, unless it was
    so young then that a change could have hidden in the clock's grain."""
    key = hashlib.sha256("\0".join(str(s.path.resolve()) for s in sources).encode()).hexdigest()[:16]
    stamps = root / f"{key}.stamps"
    known = {}
    with contextlib.suppress(OSError, ValueError):  # a lost or torn list costs one more hashing
        known = json.loads(stamps.read_bytes())

    def look(source: Source) -> tuple[str, list]:
        path = str(source.path.resolve())
        try:
            stat = os.stat(path)
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if path in known and known[path][:3] == stamp:
                return path, known[path]
            with open(path, "rb") as file:
                return path, [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise UsageError(f"{source.path}: cannot be read: {error.strerror}") from None

    now = time.time_ns()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = dict(pool.map(look, sources))
    old = {path: entry for path, entry in found.items() if now - entry[1] > 2_000_000_000}
    if old != known:
        with contextlib.suppress(OSError):  # a finished cache may be read-only; building one fails with a message
            root.mkdir(parents=True, exist_ok=True)
            temporary = stamps.with_suffix(f".{os.getpid()}-{now}")
            temporary.write_text(json.dumps(old))
            os.replace(temporary, stamps)
    return [found[str(s.path.resolve())][3] for s in sources]
