"""The rows of one file, format by format.

A format is a row of FORMATS. It has a generator of `Raw`, and a function that makes a document's
text of a decoded row. It also says in which way a file can be cut. Lines end at byte 0A and nowhere
else, never at U+2028 and its like. A row that cannot be read is a value (`Unreadable`), so that the
rows after it can still be read.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from gpt_jax.data.read import hub
from gpt_jax.data.read.arrow_rows import arrow, parquet
from gpt_jax.data.read.decoding import (
    Broken,
    Damaged,
    Decoded,
    Piece,
    Raw,
    Reading,
    Unreadable,
    check_column,
    decode,
    field_text,
    json_text,
    line_text,
    parse_json,
    plain_text,
    separated_text,
)
from gpt_jax.data.read.dialogues import dialogues, yaml_dialogues
from gpt_jax.data.read.sources import HUB, Source, format_and_packing
from gpt_jax.data.read.task_rows import choose_task_columns
from gpt_jax.data.read.text_rows import (
    NO_LINES,
    check_encodings,
    lines,
    separated,
    whole_file,
)
from gpt_jax.data.read.unpacking import BUFFER, Unpacked, opened, read_line, read_whole
from gpt_jax.data.tasks.tasks import TASKS
from gpt_jax.errors import UsageError

# This holds for the whole process. The default of 128 KiB is less than one long document.
csv.field_size_limit(2**31 - 1)


# ---- json ----


def _holds_lines(piece: Piece, reading: Reading) -> bool:
    """Whether the first line is a whole object and the file goes on after it."""
    with opened(piece.source) as file:
        first, _ = read_line(file)
        if isinstance(first, Unreadable):
            return False
        if not first.removeprefix(b"\xef\xbb\xbf").startswith(b"{"):
            return False
        try:
            parse_json(decode(first, reading).text.removeprefix("\ufeff"))
        except Unreadable:
            # This is one object over several lines. If it is not, reading all of it says so.
            return False
        return any(not block.isspace() for block in iter(lambda: file.read(BUFFER), b""))


def _json(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row for each object of a list, or one for a single object.

    The file is read as a whole, so that memory is a multiple of its size. A file that holds an
    object a line is read as .jsonl, because many are published in that way.
    """
    if _holds_lines(piece, reading):
        yield from lines(piece, reading)
        return

    try:
        with opened(piece.source) as file:
            content = read_whole(file)
        if isinstance(content, Unreadable):
            raise content
        text, encoding, replaced, _ = decode(content, reading)
        rows = parse_json(text.removeprefix("\ufeff")) if text and not text.isspace() else []
    except Unreadable as why:
        yield Raw(why, 0, -1)
        return

    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        try:
            value = field_text(row, reading, encoding, replaced if number == 1 else 0)
        except Unreadable as why:
            value = why
        yield Raw(value, 0, number if isinstance(rows, list) else -1)


# ---- tables ----


def _column(header: list[bytes], piece: Piece, reading: Reading) -> tuple[int, bool]:
    """Returns (the column of the text, whether the first row is a header).

    The config names the column. A number, from 0, means that there is no header, whatever the first
    row holds, because a class label may well be 1. Raises UsageError.
    """
    if reading.field.isdecimal() and int(reading.field) < len(header):
        return int(reading.field), False

    if any(b"\0" in name for name in header):
        raise UsageError(
            f"{piece.source.path}: its first row holds NUL, so this is UTF-16 or a binary file: "
            f"{NO_LINES}"
        )
    names = [name.decode("utf-8", "replace") for name in header]
    more = f" (or a number below {len(names)}, if the first row is no header)"
    check_column(names, piece, reading, more)
    return names.index(reading.field), True


def _cell(cells: list[bytes], column: int, width: int) -> bytes | Unreadable:
    """The text of a row of a table whose first row has `width` columns.

    Further cells that are not empty mean that a text was cut at a separator.
    """
    if cells and column >= len(cells):
        return Unreadable(f"has {len(cells)} columns, expected more than {column}")
    if any(cells[width:]):
        return Unreadable(
            f"has {len(cells)} columns and the first row {width}, so a text may be cut in two; "
            "put it in quotes (.csv) or mend the row"
        )
    return cells[column] if cells else b""


Pick = Callable[[list[bytes]], bytes | Decoded | Unreadable]


def _choose_columns(header: list[bytes], piece: Piece, reading: Reading) -> tuple[Pick, bool]:
    """Returns (what makes a value of the cells of a row, whether the first row is a header)."""
    if reading.task != "plain":
        return choose_task_columns(header, piece, reading)
    column, has_header = _column(header, piece, reading)
    return partial(_cell, column=column, width=len(header)), has_header


def _tsv(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row a line. Quotes are ordinary characters, as in IANA's text/tab-separated-values.

    So a stray quote cannot swallow the rows after it.
    """

    def cells(line: bytes) -> list[bytes]:
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        return line.split(b"\t") if line else []

    check_encodings(piece, reading)
    with opened(piece.source) as file:
        first, _ = read_line(file)
    if isinstance(first, Unreadable):
        raise Damaged(f"{piece.source.path}: its first row {first}")
    first = first.removeprefix(b"\xef\xbb\xbf")
    if not first:
        return

    pick, has_header = _choose_columns(cells(first), piece, reading)
    for number, raw in enumerate(lines(piece, reading)):
        is_first = number == 0 and piece.start == 0
        if is_first and has_header:
            yield Raw(None)
            continue
        line = first if is_first else raw.value
        if isinstance(line, Unreadable):
            yield Raw(line)
            continue
        assert isinstance(line, bytes)  # as all other rows of `lines`
        yield Raw(pick(cells(line)))


def _csv_lines(file: Unpacked, piece: Piece, row: Counter) -> Iterator[str]:
    """The lines of a table as latin-1. `row["size"]` counts the bytes since it was cleared.

    Raises Damaged if they are more than a row may have.
    """
    mark = b"\xef\xbb\xbf"
    while True:
        line, size = read_line(file)
        row["size"] += size
        if isinstance(line, Unreadable) or row["size"] > (file.largest or row["size"]):
            raise Damaged(f"{piece.source.path}: one of its rows {file.too_long()}")
        if not size:
            return
        yield line.removeprefix(mark).decode("latin-1")
        mark = b""


def _csv(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row for each row of the table. A quoted cell may hold line ends.

    Cells are cut as latin-1, which keeps every byte, and are decoded by themselves afterwards. The
    reader is strict, so that a stray quote is an error and not a very long cell. Nobody can tell
    whether what follows the error is inside that cell or a row. So it is all left out, because
    halves of cells are no documents.
    """
    check_encodings(piece, reading)
    with opened(piece.source) as file:
        size = Counter()
        table = csv.reader(_csv_lines(file, piece, size), strict=True)

        pick = None
        is_header = False
        while True:
            begin = table.line_num + 1
            try:
                size.clear()
                cells = [cell.encode("latin-1") for cell in next(table)]
                if pick is None:
                    pick, is_header = _choose_columns(cells, piece, reading)
                yield Raw(None if is_header else pick(cells))
                is_header = False
            except csv.Error as error:
                if pick is None:
                    raise UsageError(
                        f"{piece.source.path}: no header can be read: {error}"
                    ) from None
                raise Broken(
                    f"{piece.source.path}:{begin}: not CSV at line {table.line_num}: {error}"
                ) from None
            except StopIteration:
                return


class Format(NamedTuple):
    """How the files of a format are read."""

    rows: Callable[[Piece, Reading], Iterator[Raw]]

    # The text of a row whose bytes are decoded.
    text: Callable[[Decoded, Reading], Decoded] = plain_text

    # The parts that a file can be cut into: lines, separators (what is between them), groups (of
    # parquet), shards (of hf://).
    cut: str = ""

    # Whether rows are objects with columns, so that tasks can read them.
    tasks: bool = False


# The format of text files, by Reading.documents and whether there is a separator.
TEXTS = {
    "file": Format(whole_file),
    "line": Format(lines, line_text, "lines"),
    "separated": Format(separated, separated_text, "separators"),
}
# Dialogues, for tasks that read turns.
TURNS = Format(dialogues, tasks=True)
YAML = Format(yaml_dialogues, tasks=True)
BY_ARROW = (".parquet", ".arrow")
FORMATS = {
    ".txt": TEXTS,
    ".md": TEXTS,
    ".py": TEXTS,
    ".jsonl": Format(lines, json_text, "lines", tasks=True),
    ".json": Format(_json, json_text, tasks=True),
    ".csv": Format(_csv, tasks=True),
    ".tsv": Format(_tsv, cut="lines", tasks=True),
    ".parquet": Format(parquet, cut="groups", tasks=True),
    ".arrow": Format(arrow, tasks=True),
    ".yml": YAML,
    ".yaml": YAML,
    HUB: Format(hub.rows, cut="shards", tasks=True),
}


def format_of(source: Source, reading: Reading) -> Format:
    """The format of a source. That of text files depends on how `reading` cuts them.

    Raises UsageError if the task of `reading` cannot read its rows.
    """
    row = FORMATS[format_and_packing(source)[0]]
    form = row
    reads_turns = TASKS[reading.task].reads_turns
    if isinstance(row, dict):
        form = (
            TURNS if reads_turns else row["separated" if reading.separator else reading.documents]
        )
    if form is YAML and not reads_turns:
        raise UsageError(f"{source.path}: holds dialogues, which --task=chat of prepare reads")
    if reading.task != "plain" and not form.tasks:
        raise UsageError(
            f"{source.path}: --task={reading.task} reads rows with columns, which .jsonl, .json, "
            ".csv, .tsv, .parquet, .arrow and hf:// hold; convert the file"
        )
    return form
