"""The rows of text files: the whole file, or its lines."""

from collections.abc import Iterator

from gpt_jax.data.read.decoding import Piece, Raw, Reading
from gpt_jax.data.read.unpacking import opened, read_line, read_whole
from gpt_jax.errors import UsageError

NO_LINES = "its lines do not end in the byte 0A; convert the file to UTF-8"


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
