"""The bytes of a file, unpacked, and how many of them one row may have.

A small packed file can unpack to more than all memory. So a row of a packed file has a limit, which
no text reaches.
"""

import contextlib
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from gpt_jax.data.read import remote
from gpt_jax.data.read.decoding import Damaged, Unreadable
from gpt_jax.data.read.sources import Source, format_and_packing

BUFFER = 1 << 17
# A row of a packed file may have so many bytes, or so many times the bytes of the packed file if
# that is more. Text unpacks to 3 to 50 times its size, zeros to 1,000 (gzip) or 30,000 (zstd).
LARGEST_ROW = 1 << 26
LARGEST_RATIO = 200
# What pyarrow's zstd looks back at most. `zstd --long=31` writes windows of up to 2 GiB.
ARROW_WINDOW = 1 << 27
ZSTD_WINDOW = 1 << 31
# Packed bytes that are unpacked at once. A block of 4 bytes can become 128 KiB.
ZSTD_STEP = 1 << 11


class Unpacked(io.BufferedReader):
    """The unpacked bytes of a file, and the limit of its rows."""

    largest: int | None = None  # bytes that a row may have, None for a file that is not packed

    def too_long(self) -> Unreadable:
        """Why a row that goes beyond the limit is not read."""
        return Unreadable(
            f"unpacks to more than {self.largest:,} bytes, {LARGEST_RATIO} times the packed file "
            f"or {LARGEST_ROW >> 20} MiB, so it is hardly text; unpack the file if it is sound"
        )


# ---- formats ----


def _unpack_arrow(file: BinaryIO, compression: str) -> BinaryIO:
    """The unpacked bytes of a file of one or more frames.

    pyarrow refuses a torn end, and anything that follows the last frame.
    """
    import pyarrow

    return pyarrow.input_stream(file, compression=compression)


def _streams_of_xz(file: BinaryIO) -> Iterator[bytes]:
    """The unpacked bytes of all streams of a file.

    lzma.LZMAFile is no help: it takes a later stream that it cannot decode for the end of the file.
    """
    rest = b""
    while True:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not stream.eof:
            if stream.needs_input and not (rest := rest or file.read(BUFFER)):
                raise EOFError("it ends before its last stream does")
            packed = rest
            rest = b""
            yield stream.decompress(packed, BUFFER)

        # Zeros may follow a stream, in multiples of four.
        rest = stream.unused_data
        padding = 0
        while (rest := rest or file.read(BUFFER)) and not rest[0]:
            stripped = rest.lstrip(b"\0")
            padding += len(rest) - len(stripped)
            rest = stripped
        if padding % 4:
            raise lzma.LZMAError("what follows a stream is neither padding nor another one")
        if not rest:
            return


class _Blocks(io.RawIOBase):
    """A file to read, made of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, out) -> int:
        while not self.left and (block := next(self.blocks, None)) is not None:
            self.left = block
        block = self.left[: len(out)]
        self.left = self.left[len(out) :]
        out[: len(block)] = block
        return len(block)


def _find_window(head: bytes) -> int:
    """Bytes that the first frame of a .zst looks back on. 0 if `head` does not begin a frame.

    The layout is that of RFC 8878, sections 3.1.1 and 3.1.2.
    """
    at = 0
    while head[at + 1 : at + 4] == b"\x2a\x4d\x18" and head[at] >> 4 == 5:
        at += 8 + int.from_bytes(head[at + 4 : at + 8], "little")  # a frame to be skipped
    if head[at : at + 4] != b"\x28\xb5\x2f\xfd" or len(head) < at + 6:
        return 0

    descriptor = head[at + 4]
    is_single_segment = descriptor & 0x20
    if not is_single_segment:
        exponent = head[at + 5] >> 3
        mantissa = head[at + 5] & 7
        return (8 + mantissa) << (7 + exponent)

    # Such a frame looks back on all of its content, and says how much that is.
    start = at + 5 + (0, 1, 2, 4)[descriptor & 3]
    width = (1, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(head[start : start + width], "little")
    return size + 256 if width == 2 else size


def _unpack_zst(file: BinaryIO) -> BinaryIO:
    """The unpacked bytes of a .zst file.

    pyarrow does it where it can. It has no way to allow a wider window.
    """
    buffered = io.BufferedReader(file, BUFFER)  # pyright: ignore
    if _find_window(buffered.peek(BUFFER)) <= ARROW_WINDOW:
        return _unpack_arrow(buffered, "zstd")
    return _Blocks(_frames_of_zst(buffered))  # pyright: ignore


def _frames_of_zst(file: BinaryIO) -> Iterator[bytes]:
    """The unpacked bytes of all frames of a file, whatever their windows."""
    import zstandard  # pyright: ignore

    rest = b""
    while rest := rest or file.read(ZSTD_STEP):
        frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        while not frame.eof:
            packed = rest or file.read(ZSTD_STEP)
            rest = b""
            if not packed:
                raise EOFError("it ends before its last frame does")
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None  # as other libraries report damage
        rest = frame.unused_data


UNPACK: dict[str, Callable] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lambda file: _Blocks(_streams_of_xz(file)),
    ".zst": _unpack_zst,
    ".bz2": lambda file: _unpack_arrow(file, "bz2"),
}


# ---- opening ----


@contextlib.contextmanager
def opened(source: Source, seekable: bool = False) -> Iterator[Unpacked]:
    """The unpacked bytes of a file.

    If they must be `seekable`, a packed file is unpacked into a temporary one first. Raises Damaged
    if that would take more than a row of it may have.
    """
    _, packing = format_and_packing(source)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(remote.open_binary(source.path))
        largest = limit_rows(_measure(file)) if packing else None
        if packing:
            file = stack.enter_context(UNPACK[packing](file))

        unpacked = stack.enter_context(Unpacked(file, BUFFER))
        unpacked.largest = largest
        if packing and seekable:
            whole = stack.enter_context(tempfile.TemporaryFile())
            _copy(unpacked, whole, source)
            whole.seek(0)
            unpacked = Unpacked(whole, BUFFER)  # pyright: ignore
        yield unpacked


def limit_rows(size: int) -> int:
    """Bytes that a row may have whose file, or column, has `size` bytes packed."""
    return max(LARGEST_ROW, LARGEST_RATIO * size)


def _measure(file: BinaryIO | io.RawIOBase) -> int:
    """The bytes of a file, 0 if a store cannot tell."""
    if not file.seekable():
        return 0
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _copy(file: Unpacked, out: BinaryIO, source: Source) -> None:
    size = 0
    while block := file.read(1 << 20):
        size += len(block)
        if file.largest is not None and size > file.largest:
            raise Damaged(f"{source.path}: {file.too_long()}")
        out.write(block)


# ---- rows ----


def read_whole(file: Unpacked) -> bytes | Unreadable:
    """All bytes that are left, or why they are too many."""
    if file.largest is None:
        return file.read()
    blocks = []
    size = 0
    while block := file.read(1 << 20):
        blocks.append(block)
        size += len(block)
        if size > file.largest:
            return file.too_long()
    return b"".join(blocks)


def read_line(file: Unpacked) -> tuple[bytes | Unreadable, int]:
    """(the next line or why it is too long, its bytes), which are 0 at the end of the file."""
    if file.largest is None:
        line = file.readline()
        return line, len(line)

    line = file.readline(file.largest + 1)
    size = len(line)
    if size <= file.largest:
        return line, size
    while line and not line.endswith(b"\n"):
        line = file.readline(BUFFER)
        size += len(line)
    return file.too_long(), size
