"""Rows of a table as a task reads them: all columns, by their names."""

from collections.abc import Callable
from functools import partial

from gpt_jax.data.read.decoding import (
    Decoded,
    Piece,
    Reading,
    Unreadable,
    decode,
    field_text,
    listed,
)
from gpt_jax.errors import UsageError


def check_columns(names: list[str], piece: Piece, reading: Reading, more: str = "") -> None:
    """Raises UsageError unless each column of the task is there, and no name twice."""
    path = piece.source.path
    missing = [name for name in reading.columns if name not in names]
    if missing:
        raise UsageError(
            f"{path}: the column {missing[0]!r} of --task={reading.task} is missing; columns "
            f"there: {listed(names)}{more}"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"{path}: {names.count(twice[0])} columns have the name {twice[0]!r}; rename all but "
            "the one to be read"
        )


def choose_task_columns(
    header: list[bytes], piece: Piece, reading: Reading
) -> tuple[Callable[[list[bytes]], bytes | Decoded | Unreadable], bool]:
    """Returns (what makes a value of the cells of a row, whether the first row is a header).

    If the task names all of its columns by numbers, from 0, there is no header. Raises UsageError
    if a column is missing.
    """
    wanted = reading.columns
    has_header = not wanted or not all(name.isdecimal() for name in wanted)
    names = [str(number) for number in range(len(header))]
    if has_header:
        names = [name.decode("utf-8", "replace") for name in header]
        more = " (or numbers from 0, if the first row is no header)"
        check_columns(names, piece, reading, more)
    else:
        check_columns(names, piece, reading)
    return partial(read_cells, names=names, reading=reading), has_header


def read_cells(
    cells: list[bytes], names: list[str], reading: Reading
) -> bytes | Decoded | Unreadable:
    """What the task makes of a row. An empty line gives an empty text."""
    if not cells:
        return b""
    if len(cells) != len(names):
        return Unreadable(
            f"has {len(cells)} columns and the first row {len(names)}, so a text may be cut in "
            "two; put it in quotes (.csv) or mend the row"
        )
    try:
        texts = [decode(cell, reading) for cell in cells]
        row = {name: text.text for name, text in zip(names, texts, strict=True)}
        replaced = sum(text.replaced for text in texts)
        encoding = max((text.encoding for text in texts), key=reading.encodings.index)
        return field_text(row, reading, encoding, replaced)
    except Unreadable as why:
        return why
