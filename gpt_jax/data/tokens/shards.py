"""Token shards: how the ids of documents are written, read by place, and proved whole (called by
store, corpus, prepare, rows).

`NAME.tokens` holds ids (uint16 or uint32, little-endian, nothing else), `NAME.offsets` int64
[documents + 1] where each document starts and the last one ends, `NAME.docs` one DOCUMENT each.
Files are read by place and not mapped: a page fault of a map reads ahead 128 KiB for a row of 2 KiB
and kills the process when the file has shrunk (figures: benchmarks/data_format.py).
"""

import hashlib
import os
import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gpt_jax.errors import DataError
from gpt_jax.files import Digest, sync_file, write_file

# What is known of a document besides its ids: hash of its text, bytes of it in UTF-8, and where it
# came from.
DOCUMENT = np.dtype([("hash", "<u8"), ("bytes", "<u8"), ("row", "<u4"), ("piece", "<u4")])
SIDES = ("train", "eval")
SUFFIXES = (".tokens", ".offsets", ".docs")
OPEN_FILES = 256  # a thread keeps open; thousands of shards would be more than a process may have


def text_hash(text: str) -> int:
    """64 bits that copies of one text share."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Origin(NamedTuple):
    """A part of an input file, whose rows are documents."""

    name: str  # of the file, the same on every machine
    first: int  # number of its first row in the file
    several: bool  # whether the file holds more than one document

    def document(self, row: int) -> str:
        """What document `row` of this part is called: file, or file:line."""
        return f"{self.name}:{self.first + row + 1}" if self.several else self.name


class Files(threading.local):
    """Open files of this thread, the OPEN_FILES last used."""

    def __init__(self):
        self.open: OrderedDict[TokenFile, BinaryIO] = OrderedDict()

    def get(self, file: "TokenFile") -> BinaryIO:
        """By object and not by path, where another file may lie by now."""
        if file not in self.open:
            self.open[file] = open(file.path, "rb", buffering=0)
            if len(self.open) > OPEN_FILES:
                self.open.popitem(last=False)[1].close()
        self.open.move_to_end(file)
        return self.open[file]


FILES = Files()


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The ids in one file, read by place."""

    path: Path
    dtype: np.dtype
    size: int  # ids
    header: int = 0  # bytes before the first of them

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out` ([n], of `dtype`) with ids from `start` on. DataError when the file has no
        longer that many."""
        try:
            got = os.preadv(
                FILES.get(self).fileno(), [out], self.header + start * self.dtype.itemsize
            )
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more: {error.strerror}") from None
        if got != out.nbytes:
            size = os.fstat(FILES.get(self).fileno()).st_size
            raise DataError(
                f"{self.path}: changed during the run: had {self.header + self.size * self.dtype.itemsize} bytes "
                f"or more and has {size}; start again, and a cache is rebuilt; of a prepared folder see "
                "gpt-jax prepare --verify"
            )


@dataclass(frozen=True, eq=False)
class Tokens:
    """The ids of some documents, one after the other, each ended by end of text where the
    tokenizer has it. Ids and documents are numbered through all shards; no document crosses from
    one shard to the next."""

    name: str  # train or eval
    shards: tuple[TokenFile, ...]
    offsets: (
        np.ndarray
    )  # int64 [documents + 1]: starts, then the end; memory-mapped where it lies in a file
    docs: np.ndarray  # DOCUMENT [documents], memory-mapped likewise
    bytes: int  # of the text in UTF-8, specials not counted
    origins: tuple[Origin, ...] = ()  # what DOCUMENT's `piece` counts
    lost: int = (
        0  # of `bytes`, those whose characters the tokenizer does not know (Tokenizer.unknown)
    )
    begins: np.ndarray = field(
        init=False
    )  # int64 [shards + 1]: the first id of each shard, then the end

    def __post_init__(self):
        object.__setattr__(self, "begins", np.cumsum([0, *(shard.size for shard in self.shards)]))

    @property
    def size(self) -> int:
        """Ids in all."""
        return int(self.begins[-1])

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with the ids from `start` on, all of which must exist."""
        shard = int(np.searchsorted(self.begins, start, "right")) - 1
        done = 0
        while done < len(out):
            count = min(len(out) - done, int(self.begins[shard + 1]) - start - done)
            self.shards[shard].read(
                start + done - int(self.begins[shard]), out[done : done + count]
            )
            done, shard = done + count, shard + 1

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The ids [stop - start] from `start` on."""
        out = np.empty(stop - start, self.dtype)
        self.read(start, out)
        return out

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].dtype if self.shards else np.dtype(np.uint16)

    def document_name(self, document: int) -> str:
        """What a document is called: its file, or file:row."""
        if not self.origins:
            return f"document {document}"
        row = self.docs[document]
        if int(row["piece"]) >= len(self.origins):
            raise DataError(
                f"document {document} of the {self.name} tokens in {self.shards[0].path.parent}: its "
                "record is damaged; check a prepared folder with gpt-jax prepare --verify"
            )
        return self.origins[int(row["piece"])].document(int(row["row"]))


def lost(tokens: Tokens) -> str:
    """What the tokenizer does not know of a text, for people; empty if it knows all of it."""
    return (
        (
            f"{tokens.lost / max(tokens.bytes, 1):.2%} of the text is lost to <unk> ({tokens.lost:,} of "
            f"{tokens.bytes:,} bytes), and bits per byte are of the rest"
        )
        if tokens.lost
        else ""
    )


class Writer:
    """Writes one shard: `write` for ids, `end` after the last id of each document, `close` when
    all are there. Any OSError (a full disk) passes through and leaves files that nothing refers
    to."""

    def __init__(self, base: Path, dtype: np.dtype, eot: int | None):
        self.base, self.dtype = base, np.dtype(dtype)
        self.ending = np.array([] if eot is None else [eot], dtype).tobytes()
        self.file, self.digest = open(f"{base}.tokens", "wb"), hashlib.sha256()
        self.tokens, self.bytes, self.lost, self.offsets, self.docs = (
            0,
            0,
            0,
            array("q", [0]),
            bytearray(),
        )

    def write(self, ids: np.ndarray, lost: int = 0) -> None:
        """`lost`: see Tokens."""
        self.lost += lost
        self._put(ids.astype(self.dtype, copy=False).tobytes())

    def _put(self, raw: bytes) -> None:
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens += len(raw) // self.dtype.itemsize

    def end(self, hash: int, size: int, row: int, piece: int) -> None:
        """The document is complete: adds end of text and its DOCUMENT."""
        self._put(self.ending)
        self.offsets.append(self.tokens)
        self.docs += np.array((hash, size, row, piece), DOCUMENT).tobytes()
        self.bytes += size

    def close(self) -> dict[str, Digest]:
        """Everything on disk; {suffix: Digest}."""
        sync_file(self.file)
        self.file.close()
        return {
            ".tokens": Digest(self.tokens * self.dtype.itemsize, self.digest.hexdigest()),
            ".offsets": write_file(Path(f"{self.base}.offsets"), self.offsets.tobytes()),
            ".docs": write_file(Path(f"{self.base}.docs"), bytes(self.docs)),
        }


def id_type(vocab: int) -> np.dtype:
    """The smallest type that holds all ids below `vocab`."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)


def open_index(base: Path, documents: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [documents + 1], DOCUMENT [documents]) of a side, memory-mapped. ValueError
    when they do not fit a side of so many documents and tokens."""
    offsets = open_array(Path(f"{base}.offsets"), np.dtype(np.int64), documents + 1)
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise ValueError(f"{base.name}.offsets does not fit its meta")
    return offsets, open_array(Path(f"{base}.docs"), DOCUMENT, documents)


def open_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """[count] of `dtype` from a file, memory-mapped. ValueError when the file has another size."""
    wanted, size = count * np.dtype(dtype).itemsize, os.path.getsize(path)
    if size != wanted:
        raise ValueError(f"{path.name} has {size} bytes, its meta says {wanted}")
    return (
        np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray)
        if count
        else np.zeros(0, dtype)
    )
