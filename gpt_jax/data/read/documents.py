"""Documents of sources, read in order, whole or piece by piece, and counts of what was left out.

Text stays exact: newlines are not translated, and nothing is stripped. A row that cannot be used is
a UsageError that names the file and the place in it. With on_error=skip it is counted instead.
"""

import contextlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt_jax.data.read import hub
from gpt_jax.data.read.decoding import (
    SKIP,
    Damaged,
    Decoded,
    Piece,
    Reading,
    Unreadable,
    decode,
)
from gpt_jax.data.read.formats import BY_ARROW, TEXTS, format_of
from gpt_jax.data.read.sources import Source, format_and_packing
from gpt_jax.data.read.text_rows import can_be_cut, encode_separator, split
from gpt_jax.data.read.unpacking import ARROW_WINDOW, Unpacked, opened
from gpt_jax.data.tasks.example import Example, Span
from gpt_jax.errors import UsageError, escape, install_command, plain
from gpt_jax.files import describe_error

BLOCK = 1 << 20
PLACES = 5  # skipped rows that are named
# What pyarrow says of a sound .zst that it cannot unpack.
WIDE_WINDOW = "too much memory"
UNPACK_ZST = f"looks back over more than {ARROW_WINDOW >> 20} MiB; unpack it with zstd -d --long=31"
HINTS = {"zstandard": f", because it {UNPACK_ZST}, or "}


class Document(NamedTuple):
    """A text and its name."""

    name: str  # the source's, with `:row` (counted from 1) where a file holds several
    text: str
    replaced: int  # undecodable places that became U+FFFD
    row: int  # number in the piece from 0; headers, blank and skipped rows count
    spans: tuple[Span, ...] = ()  # of the text; () if all of it is learned

    @property
    def example(self) -> Example:
        """What is learned of it."""
        return Example(self.spans or (Span(self.text),))


@dataclass
class Tally:
    """What became of the rows. Two of them merge with `+=`."""

    # All rows, headers, blank and skipped ones too: the rows of the next piece begin there.
    rows: int = 0
    documents: int = 0
    empty: int = 0  # rows without text
    skipped: int = 0
    replaced: int = 0
    # How many documents each encoding decoded.
    encodings: dict[str, int] = field(default_factory=dict)
    # Places of the first skipped rows, with the reasons.
    places: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Tally") -> "Tally":
        for name in ("rows", "documents", "empty", "skipped", "replaced"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, count in other.encodings.items():
            self.encodings[name] = self.encodings.get(name, 0) + count
        self.places = (self.places + other.places)[:PLACES]
        return self

    def count(self, value: Decoded) -> None:
        """Counts a row that was read."""
        self.documents += bool(value.text)
        self.empty += not value.text
        self.replaced += value.replaced
        if value.text:
            self.encodings[value.encoding] = self.encodings.get(value.encoding, 0) + 1

    def skip(self, message: str) -> None:
        """Counts a row that was left out."""
        self.skipped += 1
        self.places = ([*self.places, escape(message)])[:PLACES]

    def notes(self, reading: Reading) -> list[str]:
        """Lines about all that a person must know. There are none if nothing was unusual."""
        others = {name: n for name, n in self.encodings.items() if name != reading.encodings[0]}
        lines = [f"{n:,} documents decoded as {name}" for name, n in sorted(others.items())]
        if self.replaced:
            lines.append(f"{self.replaced:,} undecodable places replaced by U+FFFD")
        if self.skipped:
            lines.append(f"{self.skipped:,} rows cannot be read and are left out, first:")
        return lines + [f"  {place}" for place in self.places]


@contextlib.contextmanager
def _damage(source: Source) -> Iterator[None]:
    """Turns what the libraries say of torn or missing files into UsageError."""
    kind, packing = format_and_packing(source)
    torn = f"{source.path}: a damaged or incomplete {packing or kind} file"

    try:
        yield
    except ImportError as error:
        hint = HINTS.get(error.name or "", "; ")
        raise UsageError(
            f"{source.path}: reading it needs the package {error.name}{hint}"
            f"{install_command(error.name or '')}"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Damaged(f"{torn}: {plain(error)}") from None
    except OSError as error:
        if error.errno is None and WIDE_WINDOW in str(error):
            raise UsageError(f"{source.path}: one of its frames {UNPACK_ZST}") from None
        # gzip and pyarrow report damage as an OSError without a number.
        if error.errno is None and (packing or kind in BY_ARROW):
            raise Damaged(f"{torn}: {plain(error)}") from None
        raise UsageError(f"{source.path}: cannot be read: {describe_error(error)}") from None


# ---- pieces ----


def whole_piece(source: Source) -> Piece:
    """A source as one piece."""
    return Piece(source, 0, -1)


def _find_borders(file: io.BufferedReader, size: int, find_next: Callable) -> list[int]:
    """Bytes at which pieces of about `size` bytes begin: 0, and what `find_next(file, at)` gives.

    That is where the first row begins of those whose border lies at byte `at` or later.
    """
    if not file.seekable():
        return [0]

    borders = [0]
    end = file.seek(0, 2)
    while borders[-1] + size < end:
        # A line that ends at this byte ends the piece.
        border = find_next(file, borders[-1] + size - 1)
        if border >= end:
            break
        borders.append(border)
    return borders


def _line_borders(source: Source, size: int, reading: Reading) -> list[int]:
    """Bytes at which pieces of about `size` bytes begin: 0, and line beginnings."""
    with opened(source) as file:
        return _find_borders(file, size, _next_line)


def _separator_borders(source: Source, size: int, reading: Reading) -> list[int]:
    """Bytes at which pieces of about `size` bytes begin: 0, and ends of separators."""
    separator = encode_separator(reading)
    if not can_be_cut(separator):
        return [0]

    def find_next(file: Unpacked, at: int) -> int:
        file.seek(at)
        return at + next(split(file, separator)).size

    with opened(source) as file:
        return _find_borders(file, size, find_next)


def _next_line(file: io.BufferedReader, at: int) -> int:
    """The byte after the first line end at byte `at` or later, or the end of the file."""
    file.seek(at)
    while block := file.read(BLOCK):
        place = block.find(b"\n")
        if place >= 0:
            return at + place + 1
        at += len(block)
    return at


def _group_borders(source: Source, size: int, reading: Reading) -> list[int]:
    """Row groups at which pieces of about `size` bytes (unpacked) begin."""
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(source) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise Damaged(f"{source.path}: not a readable parquet file: {plain(error)}") from None
    return _joined(sizes, size)


def _joined(sizes: Sequence[int], size: int) -> list[int]:
    """Parts at which pieces of at least `size` bytes begin."""
    borders = [0]
    total = 0
    for number, part in enumerate(sizes):
        if total >= size:
            borders.append(number)
            total = 0
        total += part
    return borders


def _shard_borders(source: Source, size: int, reading: Reading) -> list[int]:
    """Shards at which pieces of about `size` bytes begin.

    If their sizes are not known, each shard is a piece.
    """
    sizes = hub.sizes(str(source.path))
    return _joined(sizes, size) if any(sizes) else list(range(len(sizes)))


# How a file is cut, by `Format.cut`. "" keeps it whole.
CUTS = {
    "lines": _line_borders,
    "separators": _separator_borders,
    "groups": _group_borders,
    "shards": _shard_borders,
    "": lambda source, size, reading: [0],
}


def cut_source(source: Source, size: int, reading: Reading) -> tuple[Piece, ...]:
    """Pieces of about `size` bytes, at least one, which have the documents of the whole in order.

    Lines and parts between separators are cut by bytes, .parquet by row groups, and hf:// by the
    data set's own shards. Packed files and all other formats stay whole.
    """
    borders = [0]
    _, packing = format_and_packing(source)
    way = "" if packing else format_of(source, reading).cut
    with contextlib.suppress(Damaged), _damage(source):  # Reading the file will tell of damage.
        borders = list(CUTS[way](source, max(size, 1), reading)) or [0]

    stops = [*borders[1:], -1]
    return tuple(Piece(source, start, stop) for start, stop in zip(borders, stops, strict=True))


# ---- documents ----


def _name(label, piece: Piece, row: int, number: int) -> str:
    """`label:row`. A later piece may not know its row, and gives `label@start:row in the piece`."""
    if row < 0:
        return str(label)
    if row:
        return f"{label}:{row}"
    start = f"@{piece.start}" if piece.start else ""
    return f"{label}{start}:{number + 1}"


def _place(piece: Piece, row: int, number: int, reading: Reading) -> str:
    """Where a row is. For a later piece the rows before it are counted."""
    way = format_of(piece.source, reading).cut
    if not row and piece.start and way in COUNTS:
        with opened(piece.source) as file:
            row = number + 1 + COUNTS[way](file, piece.start, reading)
    return _name(piece.source.path, piece, row, number)


def _count_lines(file: io.BufferedReader, stop: int, reading: Reading) -> int:
    """The lines before byte `stop`."""
    count = 0
    while stop and (block := file.read(min(BLOCK, stop))):
        stop -= len(block)
        count += block.count(b"\n")
    return count


def _count_separated(file: Unpacked, stop: int, reading: Reading) -> int:
    """The separators before byte `stop`."""
    count = 0
    for part in split(file, encode_separator(reading)):
        stop -= part.size
        if stop < 0:
            break
        count += 1
    return count


# How the rows before a piece are counted, by `Format.cut`.
COUNTS = {"lines": _count_lines, "separators": _count_separated}


def read_documents(
    pieces: Iterable[Piece], reading: Reading, tally: Tally | None = None
) -> Iterator[Document]:
    """Every document that has text, in order. `tally` counts what was read and left out.

    Raises UsageError for a file that cannot be read, with the place in it. With on_error=skip the
    rest of a damaged file counts as one skipped row. Memory: 2 to 4 times the largest row (.csv: up
    to 11), where a whole text file is a row unless it has separators. A .json takes a multiple of
    its size.
    """
    tally = Tally() if tally is None else tally
    for piece in pieces:
        try:
            with _damage(piece.source):
                yield from _documents(piece, reading, tally)
        except MemoryError:
            raise UsageError(
                f"{piece.source.path}: memory ran out while it was read; cut text files "
                "with documents = line or a separator, make other documents smaller, or give "
                "prepare fewer --workers"
            ) from None
        except Damaged as error:
            if reading.on_error == "stop":
                raise UsageError(
                    f"{error}; {error.remedy}, or {SKIP}: all of the file from there on"
                ) from None
            tally.skip(f"{error}; the rest of the file is left out")


def _documents(piece: Piece, reading: Reading, tally: Tally) -> Iterator[Document]:
    """The documents of one piece. Raises Damaged and UsageError."""
    form = format_of(piece.source, reading)
    number = -1
    # A row may be huge, so it is in memory only once. `enumerate`, or a second name, would keep it.
    for raw in form.rows(piece, reading):
        value, start, row = raw
        raw = None
        number += 1
        tally.rows += 1

        try:
            if isinstance(value, Unreadable):
                raise value
            if isinstance(value, bytes):
                value = decode(value, reading, start)
                if not number and not piece.start and form in TEXTS.values():
                    # A mark of UTF-8 is no text.
                    value = value._replace(text=value.text.removeprefix("\ufeff"))
                value = form.text(value, reading)
        except Unreadable as why:
            message = f"{_place(piece, row, number, reading)}: {why}"
            if reading.on_error == "stop":
                raise UsageError(f"{message}; mend it, or {SKIP}") from None
            tally.skip(message)
            continue

        if value is None:
            continue
        tally.count(value)
        if value.text:
            name = _name(piece.source.name, piece, row, number)
            document = Document(name, value.text, value.replaced, number, value.spans)
            value = None
            yield document
