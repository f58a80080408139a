"""Whole texts of local files that may be compressed."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error

UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
# bz2 raises ValueError for a torn end.
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)


def read_text_file(what: str, path: str | Path) -> str:
    """The text of a file in UTF-8, unpacked if its name ends as one of UNPACK.

    Raises UsageError, which begins with `what`, if it cannot be read.
    """
    unpack = UNPACK.get(Path(path).suffix)
    try:
        raw = Path(path).read_bytes()
        # Some editors begin a file with a byte order mark, which `utf-8-sig` drops.
        return (unpack(raw) if unpack else raw).decode("utf-8-sig")
    except DAMAGED as error:
        raise UsageError(f"{what}: cannot be read: {describe_error(error)}") from None


def strip_packing(path: str | Path) -> Path:
    """The path without the ending of a compressed file."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in UNPACK else path
