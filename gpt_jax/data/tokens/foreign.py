"""Token files of other tools, read in place.

  nanogpt   NAME.bin: ids and nothing else, as uint16 (karpathy/nanoGPT, data/*/prepare.py) or, for
            larger vocabularies, as uint32
  llm.c     NAME.bin: 256 int32 of header (magic, version, count), then the ids. Magic 20240520
            version 1 is uint16 (GPT-2; modded-nanogpt writes the same), 20240801 version 7 is
            uint32 (Llama 3) (karpathy/llm.c, dev/data/data_common.py)
  megatron  NAME.bin: ids. NAME.idx: their type, and where sequences and documents lie
            (NVIDIA/Megatron-LM, core/datasets/indexed_dataset.py)
  npy       NAME.npy: one array of uint16, uint32 or int32 (karpathy/build-nanogpt, fineweb.py)

All are little-endian. No format but llm.c's tells which tokenizer made the ids, so the caller must
know it.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.read.decoding import plain
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error

HEADER_INTS = 256
LLMC = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic: (version, type)
LLMC_QUESTIONS = 20240522
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {4: np.uint32, 8: np.uint16}  # 4 is int32, and ids are never negative
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, ends of documents
AT_ONCE = 1 << 24  # ids searched for end of text at once
# Numbers at the beginning of a file that tell how wide its ids are, and the fewest that tell it.
LOOK = 1 << 20
FEWEST = 64
UNKNOWN_HIGH = 3  # high words of ids below 2**18, which no known vocabulary reaches


class Foreign(NamedTuple):
    """An opened file."""

    # uint16 or uint32 [tokens], memory-mapped. It is for one look through all ids. Training would
    # be slow with it.
    tokens: np.ndarray
    offsets: np.ndarray  # int64 [documents + 1]: starts, then the end
    kind: str  # a row of FOREIGN_FORMATS
    header: int = 0  # bytes before the first id


class Hints(NamedTuple):
    """What the caller knows of a file that does not say it."""

    eot: int | None  # the id that ends or begins documents
    token_type: str = "auto"  # as config.data.token_type
    vocab: int = 0  # ids of the tokenizer, 0 if it is not known


def _map(path: Path, dtype, count: int, offset: int = 0) -> np.ndarray:
    """[count] ids of a file, memory-mapped. Raises UsageError if there are none."""
    if not count:
        raise UsageError(f"{path}: holds no tokens")
    dtype = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def find_documents(tokens: np.ndarray, eot: int | None, eot_begins: bool | None = None):
    """int64 [documents + 1]: where the documents start that `eot` ends or begins, then the end.

    With `eot_begins=None` end of text begins documents if it is the very first id, because llm.c
    puts it in front. Without `eot` all is one document.
    """
    if eot is None:
        return np.array([0, len(tokens)], np.int64)

    blocks = range(0, len(tokens), AT_ONCE)
    places = np.concatenate([np.flatnonzero(tokens[i : i + AT_ONCE] == eot) + i for i in blocks])
    if eot_begins is None:
        eot_begins = bool(tokens[0] == eot)
    borders = places if eot_begins else places + 1
    return np.unique(np.concatenate([[0], borders, [len(tokens)]])).astype(np.int64)


# ---- formats ----


def _looks_wider(path: Path, dtype: np.dtype, vocab: int) -> bool:
    """Whether every second number is so small that two numbers must be one id."""
    numbers = np.fromfile(path, dtype, LOOK)
    count = len(numbers) // 2 * 2
    if count < FEWEST or path.stat().st_size % (2 * dtype.itemsize):
        return False
    low = numbers[0:count:2]
    high = numbers[1:count:2]
    largest = (vocab - 1) >> (8 * dtype.itemsize) if vocab else UNKNOWN_HIGH
    return int(high.max()) <= largest < int(low.max())


def _choose_type(path: Path, hints: Hints) -> np.dtype:
    """The type of the ids of a file without a header.

    Raises UsageError if the size speaks against it, or if auto would be a guess.
    """
    size = path.stat().st_size
    named = hints.token_type
    dtype = np.dtype(np.uint16 if named == "auto" else named).newbyteorder("<")
    way_out = "name the type, --config.data.token_type=uint32 or uint16"
    if size % dtype.itemsize and named == "auto":
        raise UsageError(
            f"{path}: has {size} bytes, an odd number, so it is neither nanoGPT's uint16 nor "
            "whole; known are its .bin, those of llm.c and modded-nanogpt, Megatron's .bin and "
            ".idx, and .npy"
        )
    if size % dtype.itemsize:
        raise UsageError(
            f"{path}: has {size} bytes, so it is not made of config.data.token_type = {named}; "
            "name the type that wrote it, or copy it again"
        )

    if named == "auto" and hints.vocab > 2**16:
        raise UsageError(
            f"{path}: does not say how wide its ids are, and the tokenizer has {hints.vocab:,} "
            f"ids, more than uint16 holds; {way_out}"
        )
    if named == "auto" and _looks_wider(path, dtype, hints.vocab):
        raise UsageError(
            f"{path}: every second number of 16 bits is at most that of a high half, so its ids "
            f"are probably uint32; {way_out}"
        )
    if named == "uint32" and _looks_wider(path, dtype, hints.vocab or 1):
        raise UsageError(
            f"{path}: every second number of config.data.token_type = {named} is 0, so its ids "
            "have 64 bits; write them as uint32"
        )
    return dtype


def _open_nanogpt(path: Path, hints: Hints) -> Foreign:
    dtype = _choose_type(path, hints)
    tokens = _map(path, dtype, path.stat().st_size // dtype.itemsize)
    return Foreign(tokens, find_documents(tokens, hints.eot), "nanogpt")


def _open_llmc(path: Path, hints: Hints) -> Foreign:
    header = np.fromfile(path, "<i4", HEADER_INTS)
    size = path.stat().st_size
    header_size = 4 * HEADER_INTS
    if len(header) < HEADER_INTS:
        raise UsageError(
            f"{path}: ends inside its header, at byte {size} of {header_size}; copy it again"
        )

    magic, version, count = header[:3].tolist()
    wanted, dtype = LLMC[magic]
    if version != wanted:
        raise UsageError(
            f"{path}: an llm.c file {magic} of version {version}; read is version {wanted}"
        )
    expected = header_size + count * np.dtype(dtype).itemsize
    if count < 0 or size != expected:
        raise UsageError(
            f"{path}: has {size} bytes, its header of {count:,} tokens says {expected}; copy it "
            "again"
        )
    tokens = _map(path, dtype, count, header_size)
    return Foreign(tokens, find_documents(tokens, hints.eot), "llm.c", header_size)


class MegatronIndex(NamedTuple):
    """A parsed .idx file."""

    dtype: np.dtype
    starts: np.ndarray  # int64 [sequences + 1]: where each sequence starts, then the end
    documents: np.ndarray  # int64 [documents + 1]: the first sequence of each, then the end


def _read_megatron_index(index: Path, name: str) -> MegatronIndex:
    """Raises UsageError for an index that is torn, of another kind, or does not fit itself.

    `name` is that of the .bin file, for messages.
    """
    raw = index.read_bytes()  # 20 bytes a document
    if len(raw) < MEGATRON_HEADER.size:
        raise UsageError(f"{index}: ends inside its header, at byte {len(raw)}; copy it again")

    magic, version, code, sequences, ends = MEGATRON_HEADER.unpack_from(raw)
    if magic != MEGATRON_MAGIC or version != 1:
        raise UsageError(
            f"{index}: not an index of Megatron, version 1 (begins with {raw[:9]!r}, version "
            f"{version})"
        )
    if code not in MEGATRON_TYPES:
        raise UsageError(
            f"{index}: ids of Megatron's type {code}; read are 4 (int32) and 8 (uint16); write "
            "them again"
        )

    needed = MEGATRON_HEADER.size + sequences * 12 + ends * 8
    with_modes = needed + sequences  # a byte a sequence: the modes of a multimodal set
    if len(raw) not in (needed, with_modes):
        raise UsageError(f"{index}: has {len(raw)} bytes, its header says {needed}; copy it again")

    dtype = np.dtype(MEGATRON_TYPES[code])
    at = MEGATRON_HEADER.size
    lengths = np.frombuffer(raw, "<i4", sequences, at).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, at + sequences * 4)
    documents = np.frombuffer(raw, "<i8", ends, at + sequences * 12)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise UsageError(
            f"{index}: its sequences do not lie one after the other in {name}; write it again"
        )
    covers_all = ends >= 2 and documents[0] == 0 and documents[-1] == sequences
    if not covers_all or (np.diff(documents) < 0).any():
        raise UsageError(
            f"{index}: its documents are not its {sequences:,} sequences in order; write it again"
        )
    return MegatronIndex(dtype, starts, documents)


def _open_megatron(path: Path, hints: Hints) -> Foreign:
    index = path.with_suffix(".idx")
    size = path.stat().st_size
    dtype, starts, documents = _read_megatron_index(index, path.name)
    expected = starts[-1] * dtype.itemsize
    if size != expected:
        raise UsageError(f"{path}: has {size} bytes, {index.name} says {expected}; copy it again")
    tokens = _map(path, dtype, int(starts[-1]))
    return Foreign(tokens, starts[documents].astype(np.int64), "megatron")


def _open_npy(path: Path, hints: Hints) -> Foreign:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        # numpy reads the header as Python, and raises whatever its parser does.
        raise UsageError(f"{path}: not a readable .npy file: {plain(error)}") from None

    tokens = mapped.view(np.ndarray)
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4", "<i4"):
        raise UsageError(
            f"{path}: holds {tokens.dtype} {list(tokens.shape)}, expected [N] of uint16, uint32, "
            "int32"
        )
    if not len(tokens):
        raise UsageError(f"{path}: holds no tokens")
    if tokens.dtype.str == "<i4":
        tokens = tokens.view(np.uint32)  # ids are never negative
    return Foreign(tokens, find_documents(tokens, hints.eot), "npy", mapped.offset)


FOREIGN_FORMATS = {
    "nanogpt": _open_nanogpt,
    "llm.c": _open_llmc,
    "megatron": _open_megatron,
    "npy": _open_npy,
}


def find_format(path: Path) -> str:
    """The row of FOREIGN_FORMATS that a file is, by its name, its neighbours and its first bytes.

    Raises UsageError for a file that is known not to hold a text.
    """
    if path.suffix == ".npy":
        return "npy"
    if path.with_suffix(".idx").exists():
        return "megatron"

    with open(path, "rb") as file:
        start = file.read(len(MEGATRON_MAGIC))
    magic = int.from_bytes(start[:4], "little") if len(start) >= 4 else 0
    if start == MEGATRON_MAGIC:
        raise UsageError(
            f"{path}: is an index of Megatron; it must be called .idx, beside its .bin"
        )
    if magic == LLMC_QUESTIONS:
        raise UsageError(f"{path}: holds llm.c's multiple-choice questions, not a text to train on")
    return "llm.c" if magic in LLMC else "nanogpt"


def open_foreign(
    path: Path | str, eot: int | None = None, token_type: str = "auto", vocab: int = 0
) -> Foreign:
    """The tokens of another tool's file: `.bin`, `.idx` or `.npy`.

    Of Megatron's pair either file will do. Where the file does not say where documents end, `eot`
    does, and without it all is one document. `token_type` is config.data.token_type, for a .bin
    that does not say how wide its ids are, and `vocab` is the size of the tokenizer.

    Raises UsageError, naming the file, for one that is missing, torn, or of another kind.
    """
    path = Path(path)
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    if path.suffix not in (".bin", ".npy"):
        raise UsageError(f"{path}: token files of other tools end in .bin, .idx or .npy")
    try:
        return FOREIGN_FORMATS[find_format(path)](path, Hints(eot, token_type, vocab))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None
