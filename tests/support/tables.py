"""Texts in tables and files, and the documents that are read of them."""

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from gpt_jax.data.read import documents as readers

TEXTS = [
    "one",
    "",
    "  \t ",
    "a\u2028b\x85c\x0bd\u2029e",
    '"quoted", and, commas',
    "线\U0001f44d",
    "tail  ",
]
LINED = [*TEXTS, "first\nsecond\r\nthird\n"]  # of formats whose rows hold line ends


def table(texts):
    """A table with the columns `id` and `text`."""
    return pyarrow.table({"id": list(range(len(texts))), "text": texts})


def wanted(name, texts):
    """The documents that a file of this name must give. Empty ones are none."""
    return [t for t in texts if t.strip()] if name.endswith(".txt") else [t for t in texts if t]


def read(pieces, reading, tally=None):
    """The texts of all documents in `pieces`."""
    return [d.text for d in readers.read_documents(pieces, reading, tally)]


def write_table(path, column):
    """Writes one column of text with its name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(column, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(str(path), column.schema) as out:
            out.write_table(column)
    else:
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text(
            "".join(
                separator.join(map(str, row)) + "\n"
                for row in [
                    column.column_names,
                    *zip(*(cells.to_pylist() for cells in column.columns), strict=False),
                ]
            )
        )
