"""The rows of .parquet and .arrow, whose readers are pyarrow's."""

import contextlib
from collections.abc import Iterator

from gpt_jax.data.read.decoding import (
    Damaged,
    Piece,
    Raw,
    Reading,
    Unreadable,
    check_column,
    field_text,
)
from gpt_jax.data.read.task_rows import check_columns
from gpt_jax.data.read.unpacking import limit_rows, opened
from gpt_jax.errors import UsageError, plain

# So many rows become Python objects at once.
BATCH_ROWS = 256


def _bytes_of(kind):
    """The type of the same layout that holds bytes, or None if `kind` is no text."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        values = _bytes_of(kind.value_type)
        return values and pyarrow.dictionary(kind.index_type, values, kind.ordered)
    return {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }.get(kind)


def _check_schema(schema, piece: Piece, reading: Reading) -> None:
    """Raises UsageError unless the column is there and holds text, or those of a task are there."""
    if reading.task != "plain":
        check_columns(schema.names, piece, reading)
        return
    check_column(schema.names, piece, reading)
    kind = schema.field(reading.field).type
    if _bytes_of(kind) is None:
        raise UsageError(f"{piece.source.path}: {reading.label} holds {kind}, expected text")


def _cells(batches, reading: Reading, first: int = 0) -> Iterator[Raw]:
    """The texts of record batches as bytes, which are decoded as all others are.

    `first` is the number of rows of the file before them.
    """
    import pyarrow

    row = first
    for batch in batches:
        if reading.task != "plain":
            yield from _rows(batch, reading, row)
            row += len(batch)
            continue
        column = batch.column(reading.field)
        # As bytes, so that a text that is no UTF-8 is one bad row.
        column = column.view(_bytes_of(column.type))
        # Offsets in a damaged file may point anywhere, and following them ends the process.
        column.validate(full=True)

        for at in range(0, len(column), BATCH_ROWS):
            for value in column.slice(at, BATCH_ROWS).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if value is None:
                    value = Unreadable(f"{reading.label} is null, expected text")
                yield Raw(value, 0, row)


def _rows(batch, reading: Reading, row: int) -> Iterator[Raw]:
    """What the task makes of each row of a record batch. `row` is the number of rows before it."""
    batch.validate(full=True)
    for at in range(0, len(batch), BATCH_ROWS):
        for values in batch.slice(at, BATCH_ROWS).to_pylist():
            row += 1
            try:
                yield Raw(field_text(values, reading), 0, row)
            except Unreadable as why:
                yield Raw(why, 0, row)


@contextlib.contextmanager
def _arrow_errors(piece: Piece, kind: str) -> Iterator[None]:
    """Turns what pyarrow says of a bad file into Damaged."""
    import pyarrow

    try:
        yield
    except MemoryError:  # pyarrow's own is also an ArrowException
        raise
    # A column's name that is no UTF-8 gives UnicodeDecodeError.
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(f"{piece.source.path}: not a readable {kind} file: {plain(error)}") from None


def _check_ratio(metadata, piece: Piece, reading: Reading) -> None:
    """Raises Damaged if the column unpacks to far more than text does, in any row group."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in (group.column(i) for i in range(group.num_columns)):
            size = column.total_uncompressed_size
            is_text = not reading.columns or column.path_in_schema in reading.columns
            if is_text and size > limit_rows(column.total_compressed_size):
                raise Damaged(
                    f"{piece.source.path}: {reading.label} of row group {number} unpacks to "
                    f"{size:,} bytes, so it is hardly text"
                )


def parquet(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """The rows of some row groups."""
    import pyarrow.parquet

    with (
        _arrow_errors(piece, "parquet"),
        opened(piece.source, seekable=True) as raw,
        pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
        _check_schema(file.schema_arrow, piece, reading)
        _check_ratio(file.metadata, piece, reading)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if sum(rows) != file.metadata.num_rows:
            raise Damaged(
                f"{piece.source.path}: not a readable parquet file: "
                f"it has {file.metadata.num_rows:,} rows, and its groups {sum(rows):,}"
            )

        groups = range(piece.start, len(rows) if piece.stop < 0 else piece.stop)
        # A task that names no columns looks at all of them.
        names = list(reading.columns) or None
        batches = file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=names)
        yield from _cells(batches, reading, sum(rows[: piece.start]))


def arrow(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """Both layouts of Arrow's IPC: the file, which begins with ARROW1, and the stream."""
    import pyarrow.ipc

    with _arrow_errors(piece, "Arrow"), opened(piece.source, seekable=True) as raw:
        if raw.peek(6)[:6] == b"ARROW1":
            with pyarrow.ipc.open_file(raw) as file:
                _check_schema(file.schema, piece, reading)
                yield from _cells(map(file.get_batch, range(file.num_record_batches)), reading)
        else:
            with pyarrow.ipc.open_stream(raw) as file:
                _check_schema(file.schema, piece, reading)
                yield from _cells(file, reading)
