"""Token files of other tools, read in place (called by adopt).

  nanogpt   NAME.bin: ids as uint16, nothing else (karpathy/nanoGPT, data/*/prepare.py)
  llm.c     NAME.bin: 256 int32 of header (magic, version, count), then the ids: magic 20240520 version 1 uint16 (GPT-2;
            modded-nanogpt writes the same), 20240801 version 7 uint32 (Llama 3) (karpathy/llm.c, dev/data/
            data_common.py)
  megatron  NAME.bin: ids; NAME.idx: their type, and where sequences and documents lie (NVIDIA/Megatron-LM,
            core/datasets/indexed_dataset.py)
  npy       NAME.npy: one array of uint16, uint32 or int32 (karpathy/build-nanogpt, fineweb.py)

All are little-endian. Nothing in the first and the last tells which tokenizer made them: whoever
uses them must.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.errors import UsageError

HEADER_INTS = 256
LLMC = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic: (version, type)
LLMC_QUESTIONS = 20240522
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {4: np.uint32, 8: np.uint16}  # 4 is int32, and ids are never negative
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, ends of documents
AT_ONCE = 1 << 24  # ids searched for `eot` at once


class Foreign(NamedTuple):
    tokens: (
        np.ndarray
    )  # uint16 or uint32 [tokens], memory-mapped: to be looked through once, not to train from
    offsets: np.ndarray  # int64 [documents + 1]: starts, then the end
    kind: str
    header: int = 0  # bytes before the first id


def _map(path: Path, dtype, count: int, offset: int = 0) -> np.ndarray:
    if not count:
        raise UsageError(f"{path}: holds no tokens")
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, (count,)).view(
        np.ndarray
    )


def split(tokens: np.ndarray, eot: int | None, begins: bool | None = None) -> np.ndarray:
    """Offsets of the documents that `eot` ends or `begins`; None: it begins them where it is the
    very first id (llm.c puts it in front)."""
    if eot is None:
        return np.array([0, len(tokens)], np.int64)
    at = np.concatenate(
        [np.flatnonzero(tokens[i : i + AT_ONCE] == eot) + i for i in range(0, len(tokens), AT_ONCE)]
    )
    inner = at if (tokens[0] == eot if begins is None else begins) else at + 1
    return np.unique(np.concatenate([[0], inner, [len(tokens)]])).astype(np.int64)


def _nanogpt(path: Path, eot: int | None) -> Foreign:
    size = path.stat().st_size
    if size % 2:
        raise UsageError(
            f"{path}: has {size} bytes, an odd number, so it is neither nanoGPT's uint16 nor whole; known "
            "are its .bin, those of llm.c and modded-nanogpt, Megatron's .bin and .idx, and .npy"
        )
    tokens = _map(path, np.uint16, size // 2)
    return Foreign(tokens, split(tokens, eot), "nanogpt")


def _llmc(path: Path, eot: int | None) -> Foreign:
    header, size = np.fromfile(path, "<i4", HEADER_INTS), path.stat().st_size
    if len(header) < HEADER_INTS:
        raise UsageError(
            f"{path}: ends inside its header, at byte {size} of {4 * HEADER_INTS}; copy it again"
        )
    magic, version, count = header[:3].tolist()
    wanted, dtype = LLMC[magic]
    if version != wanted:
        raise UsageError(
            f"{path}: an llm.c file {magic} of version {version}; read is version {wanted}"
        )
    expected = 4 * HEADER_INTS + count * np.dtype(dtype).itemsize
    if count < 0 or size != expected:
        raise UsageError(
            f"{path}: has {size} bytes, its header of {count:,} tokens says {expected}; copy it again"
        )
    tokens = _map(path, dtype, count, 4 * HEADER_INTS)
    return Foreign(tokens, split(tokens, eot), "llm.c", 4 * HEADER_INTS)


def _megatron(path: Path, eot: int | None) -> Foreign:
    index, size = path.with_suffix(".idx"), path.stat().st_size
    raw = index.read_bytes()  # 20 bytes a document
    if len(raw) < MEGATRON_HEADER.size:
        raise UsageError(f"{index}: ends inside its header, at byte {len(raw)}; copy it again")
    magic, version, code, sequences, ends = MEGATRON_HEADER.unpack_from(raw)
    if magic != MEGATRON_MAGIC or version != 1:
        raise UsageError(
            f"{index}: not an index of Megatron, version 1 (begins with {raw[:9]!r}, version {version})"
        )
    if code not in MEGATRON_TYPES:
        raise UsageError(
            f"{index}: ids of Megatron's type {code}; read are 4 (int32) and 8 (uint16); write them again"
        )
    needed = MEGATRON_HEADER.size + sequences * 12 + ends * 8
    if len(raw) not in (
        needed,
        needed + sequences,
    ):  # a byte a sequence: the modes of a multimodal set
        raise UsageError(f"{index}: has {len(raw)} bytes, its header says {needed}; copy it again")
    dtype = np.dtype(MEGATRON_TYPES[code])
    lengths = np.frombuffer(raw, "<i4", sequences, MEGATRON_HEADER.size).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, MEGATRON_HEADER.size + sequences * 4)
    documents = np.frombuffer(raw, "<i8", ends, MEGATRON_HEADER.size + sequences * 12)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (pointers != starts[:-1] * dtype.itemsize).any():
        raise UsageError(
            f"{index}: its sequences do not lie one after the other in {path.name}; write it again"
        )
    if (
        ends < 2
        or documents[0] != 0
        or documents[-1] != sequences
        or (np.diff(documents) < 0).any()
    ):
        raise UsageError(
            f"{index}: its documents are not its {sequences:,} sequences in order; write it again"
        )
    if size != starts[-1] * dtype.itemsize:
        raise UsageError(
            f"{path}: has {size} bytes, {index.name} says {starts[-1] * dtype.itemsize}; copy it again"
        )
    return Foreign(
        _map(path, dtype, int(starts[-1])), starts[documents].astype(np.int64), "megatron"
    )


def _npy(path: Path, eot: int | None) -> Foreign:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a readable .npy file: {error}") from None
    tokens = mapped.view(np.ndarray)
    if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4", "<i4"):
        raise UsageError(
            f"{path}: holds {tokens.dtype} {list(tokens.shape)}, expected [N] of uint16, uint32, int32"
        )
    if not len(tokens):
        raise UsageError(f"{path}: holds no tokens")
    tokens = tokens.view(np.uint32) if tokens.dtype.str == "<i4" else tokens
    return Foreign(tokens, split(tokens, eot), "npy", mapped.offset)


FOREIGN_FORMATS = {"nanogpt": _nanogpt, "llm.c": _llmc, "megatron": _megatron, "npy": _npy}


def kind_of(path: Path) -> str:
    """The row of KINDS that a file is, by its name, the files beside it, and its first bytes."""
    if path.suffix == ".npy":
        return "npy"
    if path.with_suffix(".idx").exists():
        return "megatron"
    with open(path, "rb") as file:
        start = file.read(9)
    magic = int.from_bytes(start[:4], "little") if len(start) >= 4 else 0
    if start == MEGATRON_MAGIC:
        raise UsageError(
            f"{path}: is an index of Megatron; it must be called .idx, beside its .bin"
        )
    if magic == LLMC_QUESTIONS:
        raise UsageError(f"{path}: holds llm.c's multiple-choice questions, not a text to train on")
    return "llm.c" if magic in LLMC else "nanogpt"


def open_foreign(path: Path | str, eot: int | None = None) -> Foreign:
    """The tokens of another tool's file (`.bin`, `.idx` or `.npy`; of Megatron's pair either one).
    Where the file does not say where documents end, `eot` does, and without it all is one document.

    UsageError, naming the file, for one that is missing, torn, or none of these kinds."""
    path = Path(path)
    path = path.with_suffix(".bin") if path.suffix == ".idx" else path
    if path.suffix not in (".bin", ".npy"):
        raise UsageError(f"{path}: token files of other tools end in .bin, .idx or .npy")
    try:
        return FOREIGN_FORMATS[kind_of(path)](path, eot)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
