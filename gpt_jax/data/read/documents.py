"""Documents of sources: read in order, whole or piece by piece, with a count of what was left out
(called by split and prepare).

Text stays exact: no newline translation, no stripping. Everything unusable is a UsageError that
names the file and the place in it, or with on_error=skip a row that is counted.
"""

import contextlib
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
    opened,
    plain,
)
from gpt_jax.data.read.formats import BY_ARROW, TEXTS, format_of
from gpt_jax.data.read.sources import Source, format_and_packing
from gpt_jax.errors import UsageError

__all__ = [
    "Document",
    "Piece",
    "Reading",
    "Source",
    "Tally",
    "cut_source",
    "read_documents",
    "whole_piece",
]
BLOCK = 1 << 20
PLACES = 5  # skipped rows that are named


class Document(NamedTuple):
    name: str  # the source's, with `:row` (counted from 1) where a file holds several
    text: str
    replaced: int  # undecodable places that became U+FFFD
    row: int  # number in the piece from 0; headers, blank and skipped rows count


@dataclass
class Tally:
    """What became of the rows. Two of them merge with `+=`."""

    rows: int = (
        0  # all, headers, blank and skipped ones too: where the rows of the next piece begin
    )
    documents: int = 0
    empty: int = 0  # rows without text
    skipped: int = 0
    replaced: int = 0
    encodings: dict[str, int] = field(
        default_factory=dict
    )  # documents by the encoding that decoded them
    places: list[str] = field(default_factory=list)  # and reasons of the first skipped rows

    def __iadd__(self, other: "Tally") -> "Tally":
        for name in ("rows", "documents", "empty", "skipped", "replaced"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, count in other.encodings.items():
            self.encodings[name] = self.encodings.get(name, 0) + count
        self.places = (self.places + other.places)[:PLACES]
        return self

    def count(self, value: Decoded) -> None:
        self.documents += bool(value.text)
        self.empty += not value.text
        self.replaced += value.replaced
        if value.text:
            self.encodings[value.encoding] = self.encodings.get(value.encoding, 0) + 1

    def skip(self, message: str) -> None:
        self.skipped += 1
        self.places = ([*self.places, message])[:PLACES]

    def notes(self, reading: Reading) -> list[str]:
        """What a person must be told of, a line each; nothing when all was plain."""
        others = {name: n for name, n in self.encodings.items() if name != reading.encodings[0]}
        lines = [f"{n:,} documents decoded as {name}" for name, n in sorted(others.items())]
        lines += (
            [f"{self.replaced:,} undecodable places replaced by U+FFFD"] if self.replaced else []
        )
        lines += (
            [f"{self.skipped:,} rows cannot be read and are left out, first:"]
            if self.skipped
            else []
        )
        return lines + [f"  {place}" for place in self.places]


@contextlib.contextmanager
def _damage(source: Source) -> Iterator[None]:
    """What the libraries say of files that are torn or gone, as UsageError."""
    kind, packing = format_and_packing(source)
    torn = f"{source.path}: a damaged or incomplete {packing or kind} file"
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"{source.path}: reading it needs a package; pip install {error.name}"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise Damaged(f"{torn}: {plain(error)}") from None
    except OSError as error:
        if error.errno is None and (
            packing or kind in BY_ARROW
        ):  # the word of gzip and pyarrow for damage
            raise Damaged(f"{torn}: {plain(error)}") from None
        raise UsageError(
            f"{source.path}: cannot be read: {error.strerror or plain(error)}"
        ) from None


# ---- pieces ----


def whole_piece(source: Source) -> Piece:
    return Piece(source, 0, -1)


def _line_borders(source: Source, size: int) -> list[int]:
    """Bytes at which pieces of about `size` bytes begin: 0, and line beginnings."""
    with opened(source) as file:
        if not file.seekable():
            return [0]
        end, borders = file.seek(0, 2), [0]
        while (
            at := borders[-1] + size - 1
        ) < end - 1:  # a line that ends at byte `at` ends the piece
            file.seek(at)
            while block := file.read(BLOCK):
                if (found := block.find(b"\n")) >= 0:
                    break
                at += len(block)
            if not block or at + found + 1 >= end:
                break
            borders.append(at + found + 1)
    return borders


def _group_borders(source: Source, size: int) -> list[int]:
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
    borders, held = [0], 0
    for number, part in enumerate(sizes):
        if held >= size:
            borders.append(number)
            held = 0
        held += part
    return borders


def _shard_borders(source: Source, size: int) -> list[int]:
    """Shards at which pieces of about `size` bytes begin; each one where their sizes are not
    known."""
    sizes = hub.sizes(str(source.path))
    return _joined(sizes, size) if any(sizes) else list(range(len(sizes)))


CUTS = {
    "lines": _line_borders,
    "groups": _group_borders,
    "shards": _shard_borders,
    "": lambda source, size: [0],
}


def cut_source(source: Source, size: int, reading: Reading) -> tuple[Piece, ...]:
    """Pieces of about `size` bytes, at least one, whose documents one after the other are those
    of the whole: lines by bytes, .parquet by row groups, hf:// by the data set's own shards;
    packed files and all other formats whole."""
    borders = [0]
    _, packing = format_and_packing(source)
    with contextlib.suppress(Damaged), _damage(source):  # told when it is read
        borders = list(
            CUTS["" if packing else format_of(source, reading).cut](source, max(size, 1))
        ) or [0]
    return tuple(
        Piece(source, start, stop) for start, stop in zip(borders, [*borders[1:], -1], strict=False)
    )


# ---- documents ----


def _name(label, piece: Piece, row: int, number: int) -> str:
    """`label:row`; of a later piece that does not know its row in the file, `label@start:row in
    the piece`."""
    return (
        str(label)
        if row < 0
        else f"{label}:{row}"
        if row
        else (f"{label}@{piece.start}:{number + 1}" if piece.start else f"{label}:{number + 1}")
    )


def _place(piece: Piece, row: int, number: int, reading: Reading) -> str:
    """Where a row is, its true line found by counting those before a later piece."""
    if not row and piece.start and format_of(piece.source, reading).cut == "lines":
        left, row = piece.start, number + 1
        with opened(piece.source) as file:
            while left and (block := file.read(min(BLOCK, left))):
                left, row = left - len(block), row + block.count(b"\n")
    return _name(piece.source.path, piece, row, number)


def read_documents(
    pieces: Iterable[Piece], reading: Reading, tally: Tally | None = None
) -> Iterator[Document]:
    """Every document that has text, in order; `tally` counts what was read and left out.

    UsageError for a file that cannot be read, naming it and the place in it; with on_error=skip
    the rest of a damaged one counts as a row that is skipped. Memory: 2 to 4 times the largest
    row (.csv: up to 11), where a whole text file is a row, and a multiple of a whole .json."""
    tally = Tally() if tally is None else tally
    for piece in pieces:
        try:
            with _damage(piece.source):
                yield from _documents(piece, reading, tally)
        except Damaged as error:
            if reading.on_error == "stop":
                raise UsageError(
                    f"{error}; copy it again, or {SKIP}: all of the file from there on"
                ) from None
            tally.skip(f"{error}; the rest of the file is left out")


def _documents(piece: Piece, reading: Reading, tally: Tally) -> Iterator[Document]:
    form, number = format_of(piece.source, reading), -1
    for raw in form.rows(piece, reading):
        (value, start, row), raw = (
            raw,
            None,
        )  # a huge row is held once, and as what it becomes: enumerate would hold it
        number += 1
        tally.rows += 1
        try:
            if isinstance(value, Unreadable):
                raise value
            if isinstance(value, bytes):
                value = decode(value, reading, start)
                if not number and not piece.start and form in TEXTS.values():
                    value = value._replace(
                        text=value.text.removeprefix("\ufeff")
                    )  # the mark of UTF-8, no text
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
            document, value = Document(name, value.text, value.replaced, number), None
            yield document
