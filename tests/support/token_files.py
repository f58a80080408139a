"""Token files as other tools write them, for tests."""

import struct

import numpy as np


def write_nanogpt(path, ids):
    """Writes ids as nanoGPT's prepare.py does: uint16 and nothing else."""
    np.array(ids, np.uint16).tofile(path)


def write_llmc(path, ids, magic=20240520, version=1, dtype=np.uint16, count=None):
    """Writes a shard of llm.c. A `count` other than the true one makes a wrong header."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())


def write_megatron(
    path, documents, dtype=np.uint16, code=8, version=1, magic=b"MMIDIDX\0\0", tail=b""
):
    """Writes Megatron's .bin and .idx. A document is one or two sequences, as of sentences."""
    sequences = []
    counts = [0]
    for ids in documents:
        parts = [ids] if len(ids) < 3 else [ids[:2], ids[2:]]
        sequences += parts
        counts.append(len(parts))

    ends = np.cumsum(counts)
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    pointers = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    path.write_bytes(np.concatenate(arrays).tobytes())
    path.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", magic, version, code, len(sequences), len(ends))
        + lengths.tobytes()
        + pointers.tobytes()
        + ends.astype(np.int64).tobytes()
        + tail
    )
