"""The rows of text files: the whole file, its lines, or what stands between separators."""

from collections.abc import Iterator
from typing import NamedTuple

from gpt_jax.data.read.decoding import Piece, Raw, Reading, Unreadable
from gpt_jax.data.read.unpacking import Unpacked, opened, read_line, read_whole
from gpt_jax.errors import UsageError

NO_LINES = "its lines do not end in the byte 0A; convert the file to UTF-8"
BLOCK = 1 << 20


def whole_file(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A file as one row."""
    with opened(piece.source) as file:
        # The text may be huge. The list lets go of it before the next reader has it.
        content = [read_whole(file)]
        yield Raw(content.pop(), 0, -1)


def check_encodings(piece: Piece, reading: Reading) -> None:
    """Raises UsageError for an encoding whose lines do not end in the byte 0A."""
    for name in reading.encodings:
        if b"\n".decode(name, "replace") != "\n":
            raise UsageError(
                f"{piece.source.path}: config.data.encodings = {name!r} (--encodings of prepare): "
                f"{NO_LINES}"
            )


def lines(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row a line."""
    check_encodings(piece, reading)
    with opened(piece.source) as file:
        if piece.start:
            file.seek(piece.start)

        at = piece.start
        while piece.stop < 0 or at < piece.stop:
            # A line may be huge. The list lets go of it before the next reader has it.
            *line, size = read_line(file)
            if not size:
                return
            start = at
            at += size
            yield Raw(line.pop(), start)


# ---- separators ----


class Part(NamedTuple):
    """What stands before a separator, or before the end of the file."""

    content: bytes | Unreadable
    size: int  # bytes, with the separator and the end of line after it


def encode_separator(reading: Reading) -> bytes:
    """The bytes between documents, which are the same in all encodings of `reading`."""
    return reading.separator.encode(reading.encodings[0])


def can_be_cut(separator: bytes) -> bool:
    """Whether separators are the same ones wherever the search for them begins.

    They are not if one could begin inside another, or inside the end of line after another.
    """
    overlaps = any(separator.startswith(separator[i:]) for i in range(1, len(separator)))
    return not overlaps and separator[:1] not in (b"\r", b"\n")


def _end_of_line(buffer: bytearray, at: int, separator: bytes) -> int:
    """Bytes of the end of line at `at`, which belongs to the separator before it."""
    if separator.endswith(b"\n"):
        return 0
    if buffer[at : at + 2] == b"\r\n":
        return 2
    return int(buffer[at : at + 1] == b"\n")


def split(file: Unpacked, separator: bytes) -> Iterator[Part]:
    """The parts of what is left of a file. Memory: the largest part, and a block."""
    buffer = bytearray()
    searched = 0
    dropped = 0  # bytes of a part that is too long
    is_whole = False  # whether all of the file is read
    while buffer or dropped or not is_whole:
        place = buffer.find(separator, searched)
        end = place + len(separator)
        if not is_whole and (place < 0 or len(buffer) < end + 2):
            searched = max(0, len(buffer) - len(separator) + 1) if place < 0 else place
            if file.largest is not None and searched > file.largest:
                dropped += searched
                del buffer[:searched]
                searched = 0
            block = file.read(BLOCK)
            is_whole = not block
            buffer += block
            continue

        if place < 0:
            place = end = len(buffer)
        else:
            end += _end_of_line(buffer, end, separator)
        with memoryview(buffer) as view:
            content = file.too_long() if dropped else bytes(view[:place])
        del buffer[:end]
        yield Part(content, dropped + end)
        searched = 0
        dropped = 0


def separated(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row for what stands between two separators."""
    check_encodings(piece, reading)
    with opened(piece.source) as file:
        if piece.start:
            file.seek(piece.start)

        at = piece.start
        for content, size in split(file, encode_separator(reading)):
            yield Raw(content, at)
            at += size
            if 0 <= piece.stop <= at:
                return
