"""Token shards: how the ids of documents are written, read by place, and checked.

`NAME.tokens` holds ids (uint16 or uint32, little-endian, nothing else). `NAME.offsets` holds int64
[documents + 1]: where each document starts, then where the last one ends. `NAME.docs` holds one
DOCUMENT each. `NAME.learn` holds a byte for each id: 1 if it is to be learned, or else 0. Without
the file all are learned.

Ids are read by place and not mapped. A page fault of a map reads ahead 128 KiB for a row of 2 KiB
(benchmarks/data_format.py). It also kills the process when the file has shrunk. The offsets are
held in memory, 8 bytes a document, because every batch searches them. What happens to their file
during a run changes nothing.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gpt_jax.data.tokens.open_files import OPENED
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import Digest, describe_error, is_shortage, sync_file, write_file

# The facts about a document: a hash of its text, its bytes in UTF-8, and its row in a piece of an
# input file.
DOCUMENT = np.dtype([("hash", "<u8"), ("bytes", "<u8"), ("row", "<u4"), ("piece", "<u4")])
SIDES = ("train", "eval")
SUFFIXES = (".tokens", ".learn", ".offsets", ".docs")
ID_TYPES = ("uint16", "uint32")  # of NAME.tokens
LEARN = np.dtype(np.uint8)  # of NAME.learn


def hash_text(text: str) -> int:
    """64 bits that copies of one text share."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def choose_id_type(vocab: int) -> np.dtype:
    """The smallest type that holds all ids below `vocab`."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)


# ---- reading ----


class Origin(NamedTuple):
    """A part of an input file, whose rows are documents."""

    name: str  # the file's name, the same on every machine
    first: int  # number of the part's first row in the file
    several: bool  # whether the file holds more than one document

    def document(self, row: int) -> str:
        """What document `row` of this part is called: file, or file:line."""
        return f"{self.name}:{self.first + row + 1}" if self.several else self.name


# What origins.json lists.
ORIGINS_SCHEMA = [("text", "count", "flag")]


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The ids in one file, read by place."""

    path: Path
    dtype: np.dtype
    size: int  # ids
    header: int = 0  # bytes before the first id
    sha256: str = ""  # of the whole file, where it is known

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out` ([n], of `dtype`) with the ids from `start` on.

        Raises DataError when the file can no longer be read, or no longer has that many. Raises
        UsageError where the process may open no file more.
        """
        place = self.header + start * self.dtype.itemsize
        try:
            count = os.preadv(OPENED.open(self, self.path).fileno(), [out.data], place)
        except OSError as error:
            if is_shortage(error):
                raise UsageError(f"{self.path}: {describe_error(error)}") from None
            raise DataError(
                f"{self.path}: cannot be read any more: {describe_error(error)}"
            ) from None

        if count != out.nbytes:
            least = self.header + self.size * self.dtype.itemsize
            size = os.fstat(OPENED.open(self, self.path).fileno()).st_size
            raise DataError(
                f"{self.path}: changed during the run: had {least} bytes or more and has {size}; "
                "start again, and a cache is rebuilt; of a prepared folder see "
                "gpt-jax prepare --verify"
            )


@dataclass(frozen=True, eq=False)
class Tokens:
    """The ids of some documents, one after the other, read from shards.

    Each document is ended by end of text where the tokenizer has it. Ids and documents are numbered
    through all shards, and no document crosses from one shard to the next.
    """

    name: str  # train or eval
    shards: tuple[TokenFile, ...]
    offsets: np.ndarray  # int64 [documents + 1]: where each document starts, then the end
    docs: "np.ndarray | Records"  # DOCUMENT [documents]
    bytes: int  # of the text in UTF-8; specials do not count
    origins: tuple[Origin, ...] = ()  # DOCUMENT's `piece` is a place in it
    lost: int = 0  # of `bytes`, those of characters that the tokenizer does not know
    # The bits of each shard, None for a shard that is learned whole. Empty if all shards are.
    learn: tuple[TokenFile | None, ...] = ()
    # int64 [shards + 1]: the first id of each shard, then the end.
    begins: np.ndarray = field(init=False)

    def __post_init__(self):
        begins = np.cumsum([0, *(shard.size for shard in self.shards)])
        object.__setattr__(self, "begins", begins)

    @property
    def size(self) -> int:
        """How many ids there are."""
        return int(self.begins[-1])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids in the files."""
        return self.shards[0].dtype if self.shards else np.dtype(np.uint16)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with the ids from `start` on, all of which must exist."""
        self._read(self.shards, start, out)

    def read_learn(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (LEARN) with 1 for ids from `start` on that are learned, 0 for others."""
        out[:] = 1
        if self.learn:
            self._read(self.learn, start, out)

    def _read(self, files: Sequence[TokenFile | None], start: int, out: np.ndarray) -> None:
        """Fills `out` from files with an entry for each id; None leaves its part alone."""
        shard = int(np.searchsorted(self.begins, start, "right")) - 1
        done = 0
        while done < len(out):
            left_in_shard = int(self.begins[shard + 1]) - start - done
            count = min(len(out) - done, left_in_shard)
            place = start + done - int(self.begins[shard])
            file = files[shard]
            if file is not None:
                file.read(place, out[done : done + count])
            done += count
            shard += 1

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The ids [stop - start] from `start` on."""
        out = np.empty(stop - start, self.dtype)
        self.read(start, out)
        return out

    def document_name(self, document: int) -> str:
        """What a document is called: its file, or file:row.

        Raises DataError if its record points to no file, which means damage.
        """
        if not self.origins:
            return f"document {document}"
        record = self.docs[document]
        piece = int(record["piece"])
        if piece >= len(self.origins):
            raise DataError(
                f"document {document} of the {self.name} tokens in {self.shards[0].path.parent}: "
                "its record is damaged; check a prepared folder with gpt-jax prepare --verify"
            )
        return self.origins[piece].document(int(record["row"]))


def describe_lost(tokens: Tokens) -> str:
    """What the tokenizer does not know of a text, for people; empty if it knows all of it."""
    if not tokens.lost:
        return ""
    return (
        f"{tokens.lost / max(tokens.bytes, 1):.2%} of the text is lost to <unk> ({tokens.lost:,} "
        f"of {tokens.bytes:,} bytes), and bits per byte are of the rest"
    )


# ---- writing ----


class Writer:
    """Writes one shard.

    Call `write` for ids, `end` after the last id of each document, `close` when all are written.
    A document begins with the id `begin` and ends with `eot`, where they are given.
    OSError, such as of a full disk, passes through. It leaves files that nothing refers to.
    """

    def __init__(self, base: Path, dtype: np.dtype, eot: int | None, begin: int | None = None):
        self.base = base
        self.dtype = np.dtype(dtype)
        self.beginning = np.array([] if begin is None else [begin], dtype).tobytes()
        self.ending = np.array([] if eot is None else [eot], dtype).tobytes()
        self.file = open(f"{base}.tokens", "wb")  # noqa: SIM115 - `close` closes it
        self.digest = hashlib.sha256()
        self.learn_file: BinaryIO | None = None  # opened for the first id that is not learned
        self.learn_digest = hashlib.sha256()
        self.learned_last = True  # whether the last id of the document is
        self.unlearned = 0
        self.tokens = 0
        self.bytes = 0
        self.lost = 0
        self.offsets = array("q", [0])
        self.docs = bytearray()

    def write(self, ids: np.ndarray, lost: int = 0, learn: bool = True) -> None:
        """Adds ids to the document. `lost` is what Tokens counts under that name.

        Before the first ids comes the id that begins documents, unless they begin with it, as what
        a chat template writes may. It is learned if they are.
        """
        self.lost += lost
        self.learned_last = learn
        raw = ids.astype(self.dtype, copy=False).tobytes()
        is_first = self.tokens == self.offsets[-1]
        if self.beginning and is_first and not raw.startswith(self.beginning):
            self._put(self.beginning)
        self._put(raw)

    def _put(self, raw: bytes) -> None:
        """Adds ids that are learned if `learned_last` says so."""
        count = len(raw) // self.dtype.itemsize
        self._put_learn(count)
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens += count

    def _put_learn(self, count: int) -> None:
        if self.learned_last and self.learn_file is None:
            return
        bits = bytes([self.learned_last]) * count
        if self.learn_file is None:
            self.learn_file = open(f"{self.base}.learn", "wb")  # noqa: SIM115 - `close` closes it
            bits = b"\1" * self.tokens + bits
        self.unlearned += count * (not self.learned_last)
        self.learn_file.write(bits)
        self.learn_digest.update(bits)

    def end(self, hash: int, size: int, row: int, piece: int) -> None:
        """Ends the document: adds end of text, and its DOCUMENT.

        End of text is learned if the last id of the document is.
        """
        self._put(self.ending)
        self.offsets.append(self.tokens)
        self.docs += np.array((hash, size, row, piece), DOCUMENT).tobytes()
        self.bytes += size

    def close(self) -> dict[str, Digest]:
        """Sends everything to the disk, and gives {suffix: Digest}."""
        learn = {}
        if self.learn_file is not None:
            sync_file(self.learn_file)
            learn = {".learn": Digest(self.tokens, self.learn_digest.hexdigest())}
        sync_file(self.file)
        self.close_files()
        return {
            ".tokens": Digest(self.tokens * self.dtype.itemsize, self.digest.hexdigest()),
            **learn,
            ".offsets": write_file(Path(f"{self.base}.offsets"), self.offsets.tobytes()),
            ".docs": write_file(Path(f"{self.base}.docs"), bytes(self.docs)),
        }

    def close_files(self) -> None:
        """Closes what is open, whole or not."""
        self.file.close()
        if self.learn_file is not None:
            self.learn_file.close()

    def counts(self) -> dict[str, int]:
        """How much was written."""
        counts = {
            "tokens": self.tokens,
            "documents": len(self.offsets) - 1,
            "bytes": self.bytes,
            "lost": self.lost,
        }
        return counts | ({"unlearned": self.unlearned} if self.unlearned else {})


# ---- the index ----


@dataclass(frozen=True, eq=False)
class Records:
    """The DOCUMENT of each document in a file, read when it is asked for."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | str) -> np.ndarray:
        """The record of a document, or a field of all records.

        Raises DataError when the file can no longer be read, or no longer has that many.
        """
        if isinstance(key, str):
            return self._read(0, self.count)[key]
        return self._read(int(key), 1)[0]

    def _read(self, start: int, count: int) -> np.ndarray:
        try:
            records = np.fromfile(self.path, DOCUMENT, count, offset=start * DOCUMENT.itemsize)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {describe_error(error)}"
            ) from None
        if len(records) != count:
            raise DataError(
                f"{self.path}: changed since it was opened: it ends before document "
                f"{start + count}; of a prepared folder see gpt-jax prepare --verify"
            )
        return records


def open_index(
    base: Path, documents: int, tokens: int, sha256: str = ""
) -> tuple[np.ndarray, Records]:
    """The offsets int64 [documents + 1] of a side, in memory, and its records.

    `sha256` is that of the offsets, if it is known. Raises ValueError when they do not fit a side
    of so many documents and tokens.
    """
    path = Path(f"{base}.offsets")
    raw = _read_whole(path, 8 * (documents + 1))
    offsets = np.frombuffer(raw, np.int64)
    is_whole = not sha256 or hashlib.sha256(raw).hexdigest() == sha256
    is_rising = not (offsets[1:] < offsets[:-1]).any()
    if not (is_whole and is_rising) or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"{path.name} does not fit its meta")

    records = Path(f"{base}.docs")
    _check_size(records, documents * DOCUMENT.itemsize, os.path.getsize(records))
    return offsets, Records(records, documents)


def _read_whole(path: Path, wanted: int) -> bytes:
    """The content of a file of `wanted` bytes. Raises ValueError when it has another size."""
    _check_size(path, wanted, os.path.getsize(path))
    raw = path.read_bytes()
    _check_size(path, wanted, len(raw))
    return raw


def _check_size(path: Path, wanted: int, size: int) -> None:
    if size != wanted:
        raise ValueError(f"{path.name} has {size} bytes, its meta says {wanted}")
