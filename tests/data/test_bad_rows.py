"""Rows, columns and files that cannot be read are named or counted."""

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tables import read, write_table

from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.errors import UsageError

BAD = {  # file, its content with one bad row, a reading, the message; "good" and "fine" are left
    "malformed json": (
        "a.jsonl",
        b'{"text": "good"}\n{"text": \n{"text": "fine"}\n',
        {},
        "a.jsonl:2: not JSON",
    ),
    "no such field": (
        "a.jsonl",
        b'{"text": "good"}\n{"body": "x", "id": 1}\n{"text": "fine"}\n',
        {},
        r"a.jsonl:2: .*'text'.* missing; fields there: body, id",
    ),
    "not text": (
        "a.jsonl",
        b'{"text": "good"}\n{"text": null}\n{"text": "fine"}\n',
        {},
        "a.jsonl:2: .* holds None",
    ),
    "undecodable": (
        "a.jsonl",
        b'{"text": "good"}\n{"text": "\xff"}\n{"text": "fine"}\n',
        {},
        r"a.jsonl:2: not UTF-8 at byte 27 \(0xff\)",
    ),
    "undecodable in two": (
        "a.txt",
        b"good\n" + b"\x81\x30\n" + b"fine\n",
        {"documents": "line", "encodings": ("utf-8", "gb18030")},
        "not UTF-8 .*, nor GB18030",
    ),
    "nul": ("a.txt", b"good\n\0\nfine\n", {"documents": "line"}, "a.txt:2: byte 5 is NUL"),
    "surrogate": (
        "list.json",
        b'[{"text": "good"}, {"text": "\\ud800"}, {"text": "fine"}]',
        {},
        "list.json:2: character 0",
    ),
    "list of others": (
        "list.json",
        b'[{"text": "good"}, 7, {"text": "fine"}]',
        {},
        "list.json:2: expected a JSON object",
    ),
    "short csv row": (
        "a.csv",
        b"id,text\n1,good\n2\n3,fine\n",
        {},
        "a.csv:3: has 1 columns, expected more than 1",
    ),
    "long csv row": (
        "a.csv",
        b"id,text\n1,good,\n2,half, and half\n3,fine\n",
        {},
        "a.csv:3: has 3 columns and the first row 2, .*quotes",
    ),
    "long tsv row": (
        "a.tsv",
        b"id\ttext\n1\tgood\t\n2\thalf\thalf\n3\tfine\n",
        {},
        "a.tsv:3: has 3 columns",
    ),
    "short tsv row": ("a.tsv", b"id\ttext\n1\tgood\n2\n3\tfine\n", {}, "a.tsv:3: has 1 columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_stops_or_is_counted(tmp_path, name):
    file, content, how, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    [source] = sources.find_sources((str(tmp_path / file),))
    with pytest.raises(UsageError, match=message) as stopped:
        read([readers.whole_piece(source)], Reading(**how))
    assert str(stopped.value).endswith(
        "; mend it, or gpt-jax prepare --on_error=skip leaves it out and counts it"
    )

    skip = Reading(on_error="skip", **how)
    tally = Tally()
    for pieces in ([readers.whole_piece(source)], readers.cut_source(source, 1, skip)):
        tally = Tally()
        assert read(pieces, skip, tally) == ["good", "fine"]
        assert (tally.skipped, tally.documents) == (1, 2)
        assert any("1 rows cannot be read" in line for line in tally.notes(skip))
        with pytest.raises(UsageError, match=message):
            raise UsageError(tally.places[0])


def test_only_the_first_places_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("oops\n" * 100)
    [source] = sources.find_sources((str(tmp_path / "a.jsonl"),))
    tally = Tally()
    assert read(readers.cut_source(source, 50, Reading()), Reading(on_error="skip"), tally) == []
    assert tally.skipped == tally.rows == 100 and len(tally.places) == readers.PLACES
    assert tally.places[0].startswith(f"{tmp_path}/a.jsonl:1: not JSON")
    first = Tally(places=["a"] * 3)
    then = Tally(places=["b"] * 3)
    first += then
    assert first.places == ["a"] * 3 + ["b"] * 2


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", b"id,body\n1,x\n"),
        ("a.tsv", b"id\tbody\n1\tx\n"),
        ("a.parquet", None),
        ("a.arrow", None),
    ],
)
def test_a_column_that_does_not_exist_is_never_skipped(tmp_path, name, content, on_error):
    one = pyarrow.table({"id": [1], "body": ["x"]})
    if name == "a.parquet":
        pyarrow.parquet.write_table(one, tmp_path / name)
    elif name == "a.arrow":
        with pyarrow.ipc.new_file(str(tmp_path / name), one.schema) as out:
            out.write_table(one)
    else:
        (tmp_path / name).write_bytes(content)
    [source] = sources.find_sources((str(tmp_path / name),))

    with pytest.raises(
        UsageError,
        match=rf"{name}: config.data.field = 'text' .* is missing; columns there: id, body",
    ):
        read([readers.whole_piece(source)], Reading(on_error=on_error))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_a_name_of_two_columns_is_refused_where_it_is_read(tmp_path, name, on_error):
    columns = [pyarrow.array([text]) for text in ("first", "second", "fine")]
    write_table(tmp_path / name, pyarrow.Table.from_arrays(columns, names=["text", "text", "body"]))
    pieces = [readers.whole_piece(*sources.find_sources((str(tmp_path / name),)))]
    with pytest.raises(
        UsageError,
        match=rf"{name}: .*'text' .* names 2 columns; columns there: text, text, body; rename",
    ):
        read(pieces, Reading(on_error=on_error))
    assert read(pieces, Reading("body", on_error=on_error)) == ["fine"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl"])
def test_names_of_columns_are_one_line_without_control_characters(tmp_path, name):
    if name == "a.jsonl":
        (tmp_path / name).write_text('{"\\u001b[2J\\n": 1, "b": 2}')
    else:
        write_table(
            tmp_path / name,
            pyarrow.table({"\x1b[2J\n" if name[2] in "pa" else "\x1b[2J": ["x"], "b": ["y"]}),
        )
    with pytest.raises(UsageError, match=r"there: \\x1b\[2J ?, b") as error:
        read([readers.whole_piece(*sources.find_sources((str(tmp_path / name),)))], Reading())
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'[{"text": "x"},\n {"text": ]', "a.json: not JSON: .*line 2"),
        ("a.arrow", b"ARROW1 not", "not a readable Arrow"),
        ("a.arrow", b"no stream", "not a readable Arrow"),
        ("a.arrow", b"", "not a readable Arrow"),
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.csv", b'"open,text\n', "no header can be read"),
        ("a.json", b'{"body": "x"}', "a.json: .*'text'.* missing; fields there: body"),
    ],
)
def test_files_of_no_use(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    [source] = sources.find_sources((str(tmp_path / name),))
    with pytest.raises(UsageError, match=message):
        read(readers.cut_source(source, 10, Reading()), Reading())


def test_empty_files_and_one_object(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(b"")
    found = sources.find_sources((str(tmp_path),))
    assert (
        len(found) == 5
        and read([p for s in found for p in readers.cut_source(s, 9, Reading())], Reading()) == []
    )

    (tmp_path / "b.json").write_text('{\n "text": "only",\n "id": 1}\n')
    found = sources.find_sources((str(tmp_path / "b.json"),))
    assert [
        (d.name, d.text) for d in readers.read_documents(map(readers.whole_piece, found), Reading())
    ] == [("b.json", "only")]


@pytest.mark.parametrize(
    "rest, line",
    [
        ('"he said \\"hi\\" to me\nand left\nfor good"\n"next"\n', 3),
        ('"x"y\nfine\n', 3),
        ('good\n"never closed\nand on\n', 4),
        ('"one\ntwo"three\nfour"\n', 3),
    ],
)
def test_after_a_broken_cell_the_rest_of_a_table_is_left_out(tmp_path, rest, line):
    """The text after it may be the rest of the cell, which is no document."""
    (tmp_path / "a.csv").write_text("text\ngood\n" + rest)
    (tmp_path / "b.csv").write_text("text\nafter\n")
    pieces = [readers.whole_piece(source) for source in sources.find_sources((str(tmp_path),))]
    with pytest.raises(UsageError, match=rf"a.csv:{line}: not CSV at line .*; mend it, or .*skip"):
        read(pieces, Reading())

    skip = Reading(on_error="skip")
    tally = Tally()
    kept = ["good", "good"] if rest.startswith("good") else ["good"]
    assert read(pieces, skip, tally) == [*kept, "after"]
    assert tally.skipped == 1 and "the rest of the file is left out" in tally.places[0]
