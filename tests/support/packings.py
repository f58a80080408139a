"""Compressed files for tests."""

import bz2
import gzip
import lzma

import pyarrow


def _compress_zst(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": _compress_zst,
}


def pack(raw: bytes, suffix: str) -> bytes:
    """`raw` compressed in two frames, if the format has frames."""
    half = len(raw) // 2
    compress = COMPRESS[suffix]
    return compress(raw[:half]) + compress(raw[half:])
