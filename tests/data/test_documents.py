"""Readers: every format gives the same documents however it is cut and packed.

Bad rows, encodings, remote files and hf:// are here too.
"""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import pickle
import random
import re
import struct
import tracemalloc

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fsspec.exceptions import FSTimeoutError
from packings import pack

from gpt_jax.data.read import documents as readers, formats, hub, remote, sources
from gpt_jax.data.read.decoding import Damaged, Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.read.sources import Source
from gpt_jax.data.tokens.hashes import hash_sources
from gpt_jax.errors import UsageError

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
    return pyarrow.table({"id": list(range(len(texts))), "text": texts})


def arrow(path, texts, make):
    with make(str(path), table(texts).schema) as out:
        for batch in table(texts).to_batches(max_chunksize=3):
            out.write_batch(batch)


def write_csv(path, texts):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])


def rows(texts):
    return [{"id": i, "text": t} for i, t in enumerate(texts)]


WRITERS = {  # name: (writer of a file, what it holds)
    "a.txt": (lambda p, t: p.write_bytes("\n".join(t).encode()), TEXTS),
    "crlf.txt": (lambda p, t: p.write_bytes("\r\n".join([*t, ""]).encode()), TEXTS),
    "a.jsonl": (
        lambda p, t: p.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows(t))),
        LINED,
    ),
    "list.json": (lambda p, t: p.write_text(json.dumps(rows(t), indent=1)), LINED),
    "lines.json": (
        lambda p, t: p.write_text("".join(json.dumps(r) + "\n" for r in rows(t))),
        LINED,
    ),
    "a.tsv": (
        lambda p, t: p.write_text(
            "".join(f"{i}\t{text}\n" for i, text in [("id", "text"), *enumerate(t)])
        ),
        [t.replace("\t", "") for t in TEXTS],
    ),
    "a.csv": (write_csv, LINED),
    "a.parquet": (lambda p, t: pyarrow.parquet.write_table(table(t), p, row_group_size=2), LINED),
    "file.arrow": (lambda p, t: arrow(p, t, pyarrow.ipc.new_file), LINED),
    "stream.arrow": (lambda p, t: arrow(p, t, pyarrow.ipc.new_stream), LINED),
}


def wanted(name, texts):
    return [t for t in texts if t.strip()] if name.endswith(".txt") else [t for t in texts if t]


def read(pieces, reading, tally=None):
    return [d.text for d in readers.read_documents(pieces, reading, tally)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_cut_gives_the_whole(tmp_path, name):
    write, texts = WRITERS[name]
    write(tmp_path / name, texts)
    [source], reading = sources.find_sources((str(tmp_path / name),)), Reading(documents="line")
    whole = Tally()
    assert read([readers.whole_piece(source)], reading, whole) == wanted(name, texts)

    most = 1
    for size in (1, 2, 7, 20, 64, 10**6):
        pieces = readers.cut_source(source, size, reading)
        total = Tally()
        places = []
        for piece in pieces:
            tally = Tally()
            places += [(piece, d.row) for d in readers.read_documents([piece], reading, tally)]
            total += tally
        assert read(pickle.loads(pickle.dumps(pieces)), reading) == wanted(name, texts)
        assert total == whole and len(set(places)) == len(places) == whole.documents
        most = max(most, len(pieces))
    cutting = formats.format_of(source, reading).cut
    assert most > 3 if cutting else most == 1


@pytest.mark.parametrize("packing", sources.COMPRESSIONS[1:])
@pytest.mark.parametrize("name", WRITERS)
def test_every_packing(tmp_path, name, packing):
    write, texts = WRITERS[name]
    write(tmp_path / name, texts)
    packed = tmp_path / f"{name}{packing}"
    packed.write_bytes(pack((tmp_path / name).read_bytes(), packing))
    [source], reading = sources.find_sources((str(packed),)), Reading(documents="line")
    assert len(readers.cut_source(source, 1, reading)) == 1
    assert read(readers.cut_source(source, 1, reading), reading) == wanted(name, texts)


def test_a_line_that_ends_at_the_size_ends_the_piece(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"1234567\n" * 4)
    [source] = sources.find_sources((str(tmp_path / "a.jsonl"),))
    assert [(p.start, p.stop) for p in readers.cut_source(source, 8, Reading())] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, -1),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert [(p.start, p.stop) for p in readers.cut_source(source, 8, Reading())] == [(0, -1)]


# ---- names and places ----


def test_names_and_true_lines_of_later_pieces(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(9)) + "oops\n")
    [source] = sources.find_sources((str(path),))
    pieces = readers.cut_source(source, 40, Reading())
    assert [d.name for d in readers.read_documents(pieces[:2], Reading())] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "a.jsonl@42:1",
        "a.jsonl@42:2",
        "a.jsonl@42:3",
    ]
    with pytest.raises(UsageError, match=r"a.jsonl:10: not JSON"):
        read(pieces, Reading())

    column = pyarrow.table({"text": ["a", "b", "c", None]})
    pyarrow.parquet.write_table(column, tmp_path / "a.parquet", row_group_size=1)
    [source] = sources.find_sources((str(tmp_path / "a.parquet"),))
    pieces = readers.cut_source(source, 1, Reading())
    assert [d.name for d in readers.read_documents(pieces[:3], Reading())] == [
        "a.parquet:1",
        "a.parquet:2",
        "a.parquet:3",
    ]
    with pytest.raises(UsageError, match=r"a.parquet:4: .* is null"):
        read(pieces, Reading())


def test_headers_are_numbered_as_rows(tmp_path):
    for name, content in [
        ("a.csv", 'id,text\n1,"x\ny"\n2,z\n'),
        ("a.tsv", "id\ttext\n1\tx\n2\tz\n"),
    ]:
        (tmp_path / name).write_text(content)
        found = sources.find_sources((str(tmp_path / name),))
        assert [
            (d.name, d.row)
            for d in readers.read_documents(map(readers.whole_piece, found), Reading())
        ] == [(f"{name}:2", 1), (f"{name}:3", 2)]


def test_tables_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text('1,"one, two"\n2,three\n')
    (tmp_path / "a.tsv").write_text('1\tsays "no\n2\tthree"\n')
    for name, texts in [("a.csv", ["one, two", "three"]), ("a.tsv", ['says "no', 'three"'])]:
        [source] = sources.find_sources((str(tmp_path / name),))
        for size in (5, 999):
            assert read(readers.cut_source(source, size, Reading("1")), Reading("1")) == texts
        with pytest.raises(
            UsageError, match=rf"{name}: config.data.field = '2' .* is missing; columns there: 1, "
        ):
            read([readers.whole_piece(source)], Reading("2"))


# ---- rows that cannot be read ----


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


@pytest.mark.parametrize("encodings", [("utf-8",), ("utf-16",)])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_in_utf16_are_to_be_converted(tmp_path, name, encodings):
    for text in ("text\nx\n", "id,text\n1,x\n", "id\ttext\n1\tx\n"):
        (tmp_path / name).write_bytes(text.encode("utf-16"))
        with pytest.raises(
            UsageError,
            match=f"{name}: .*its lines do not end in the byte 0A; convert the file to UTF-8",
        ) as e:
            read(
                [readers.whole_piece(*sources.find_sources((str(tmp_path / name),)))],
                Reading(encodings=encodings),
            )
        assert str(e.value).isprintable() and "missing" not in str(e.value)


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


def test_dictionary_columns_and_bad_bytes_in_tables(tmp_path):
    column = pyarrow.array(["a", "b", "a", None]).dictionary_encode()
    with pyarrow.ipc.new_stream(
        str(tmp_path / "a.arrow"), pyarrow.schema([("text", column.type)])
    ) as out:
        out.write_table(pyarrow.table({"text": column}))
    reading = Reading(on_error="skip")
    tally = Tally()
    assert read(
        map(readers.whole_piece, sources.find_sources((str(tmp_path / "a.arrow"),))), reading, tally
    ) == [
        "a",
        "b",
        "a",
    ]
    assert tally.skipped == 1

    raw = pyarrow.array([b"ok", b"\xffx"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    pieces = [readers.whole_piece(s) for s in sources.find_sources((str(tmp_path / "a.parquet"),))]
    with pytest.raises(UsageError, match=r"a.parquet:2: not UTF-8 at byte 0"):
        read(pieces, Reading())

    tally = Tally()
    assert (
        read(pieces, Reading(errors="replace"), tally) == ["ok", "\ufffdx"] and tally.replaced == 1
    )

    write_table(tmp_path / "b.arrow", pyarrow.table({"text": raw}))
    with pytest.raises(UsageError, match=r"b.arrow:2: not UTF-8 at byte 0"):
        read([readers.whole_piece(*sources.find_sources((str(tmp_path / "b.arrow"),)))], Reading())


LONG = ["a" * 20, "b" * 30, "c" * 40]
PLACES = {  # of the texts in a file of Arrow: (type, layout of the places, the true ones, others)
    "string": (pyarrow.string(), "<4i", (0, 20, 50, 90), (0, 20, 1 << 30, 90)),
    "large string": (pyarrow.large_string(), "<4q", (0, 20, 50, 90), (0, 20, 1 << 60, 90)),
    "view": (pyarrow.string_view(), "<i4sii", (30, b"bbbb", 0, 20), (30, b"bbbb", 0, 1 << 30)),
    "dictionary": (
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "<3i",
        (0, 1, 2),
        (0, 1 << 28, 2),
    ),
    "its values": (
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        "<4i",
        (0, 20, 50, 90),
        (0, 20, 1 << 30, 90),
    ),
}


@pytest.mark.parametrize("make", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
@pytest.mark.parametrize("name", PLACES)
def test_places_that_lie_outside_are_damage(tmp_path, name, make):
    """Following them would end the process."""
    kind, layout, true, wrong = PLACES[name]
    column = pyarrow.table({"text": pyarrow.array(LONG).cast(kind)})
    path = tmp_path / "a.arrow"
    with make(str(path), column.schema) as out:
        out.write_table(column)
    [source], raw, skip, tally = (
        sources.find_sources((str(path),)),
        path.read_bytes(),
        Reading(on_error="skip"),
        Tally(),
    )
    assert (
        read([readers.whole_piece(source)], Reading()) == LONG
        and raw.count(struct.pack(layout, *true)) == 1
    )

    path.write_bytes(raw.replace(struct.pack(layout, *true), struct.pack(layout, *wrong)))
    with pytest.raises(UsageError, match=r"a.arrow: not a readable Arrow file: .*copy it again"):
        read([readers.whole_piece(source)], Reading())
    assert read([readers.whole_piece(source)], skip, tally) == [] and tally.skipped == 1


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_in_parquet_is_named_in_one_line(tmp_path, checksums):
    texts = ["".join(random.Random(i).choices("ab", k=99)) for i in range(99)]
    path = tmp_path / "a.parquet"
    told = 0
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="none", write_page_checksum=checksums
    )
    [source], raw = sources.find_sources((str(path),)), path.read_bytes()
    for at in [*range(4, 60), *range(5000, 5100), *range(len(raw) - 400, len(raw))]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            assert (
                read(readers.cut_source(source, 1, Reading()), Reading()) == texts or not checksums
            )
        except UsageError as error:
            assert (
                re.search(
                    r"a.parquet: (a damaged or incomplete .parquet file|not a readable parquet "
                    r"file|config.data)",
                    str(error),
                )
                or not checksums
            )
            assert str(error).isprintable()
            told += "incomplete .parquet file" in str(error)

    assert told > 20


# ---- encodings ----


def test_mixed_encodings(tmp_path):
    words = [("utf-8", "汉字 utf-8"), ("gb18030", "简体中文"), ("utf-8", "plain")]
    (tmp_path / "a.txt").write_bytes(b"\n".join(text.encode(name) for name, text in words))
    lined = Reading(documents="line", encodings=("utf-8", "gb18030"))
    [source] = sources.find_sources((str(tmp_path / "a.txt"),))
    tally = Tally()
    assert read(readers.cut_source(source, 4, lined), lined, tally) == [text for _, text in words]
    assert tally.encodings == {"utf-8": 2, "gb18030": 1} and tally.notes(lined) == [
        "1 documents decoded as gb18030"
    ]

    cells = [b'1,"%s\nx"\n' % text.encode(name) for name, text in words]
    (tmp_path / "b.csv").write_bytes(b"id,text\n" + b"".join(cells))
    found = map(readers.whole_piece, sources.find_sources((str(tmp_path / "b.csv"),)))
    assert read(found, lined) == [f"{text}\nx" for _, text in words]

    (tmp_path / "c.txt").write_text("汉字", encoding="utf-16")
    files = [readers.whole_piece(s) for s in sources.find_sources((str(tmp_path / "c.txt"),))]
    assert read(files, Reading(encodings=("utf-8", "utf-16"))) == ["汉字"]
    with pytest.raises(
        UsageError,
        match=r"config.data.encodings = 'utf-16' .*: its lines do not end in the byte 0A",
    ):
        read(files, Reading(encodings=("utf-8", "utf-16"), documents="line"))


@pytest.mark.parametrize(
    "how, message",
    [
        ({"encodings": ("utf-9",)}, "encodings = 'utf-9': no text encoding"),
        ({"encodings": ("base64",)}, "no text encoding"),
        ({"encodings": ()}, "encodings is empty"),
        ({"errors": "ignore"}, "errors = 'ignore': choose one of strict, replace"),
        ({"on_error": "x"}, "on_error = 'x'"),
        ({"documents": "page"}, "documents = 'page': choose one of file, line"),
    ],
)
def test_readings_that_mean_nothing(how, message):
    with pytest.raises(UsageError, match=message):
        Reading(**how)


# ---- memory ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.txt", "a.csv"])
def test_memory_is_about_the_line(tmp_path, name):
    size = 1_500_000
    line = {"a.jsonl": b'{"text": "%s"}', "a.tsv": b"%s"}.get(name, b"%s") % (b"x" * size)
    (tmp_path / name).write_bytes(
        (b"text\n" if name in ("a.tsv", "a.csv") else b"") + (line + b"\n") * 24
    )
    [source], reading = sources.find_sources((str(tmp_path / name),)), Reading(documents="line")
    tracemalloc.start()
    for _ in readers.read_documents(readers.cut_source(source, size, reading), reading):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The csv module holds 4 to 8 bytes a character while it reads.
    most = {"a.csv": 12, "a.tsv": 4.5}.get(name, 3.5)

    assert peak < most * size


# ---- object stores, on fsspec's stand-ins ----


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path):
    """(URL of a folder, function that writes a file into it)."""
    url = f"memory://{tmp_path}/box" if request.param == "memory" else f"file://{tmp_path}/box"

    def put(name, content):
        with fsspec.open(f"{url}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)

    yield url, put
    if request.param == "memory":
        fsspec.filesystem("memory").rm(f"{tmp_path}", recursive=True)


def test_object_store(bucket, tmp_path):
    url, put = bucket
    raw = "".join(json.dumps({"text": t}) + "\n" for t in LINED).encode()
    put("b.jsonl", raw)
    put("deep/a.jsonl.gz", pack(raw, ".gz"))
    put("deep/a.jsonl.zst", pack(raw, ".zst"))
    put("deep/picture.png", b"x")
    put(".hidden/a.txt", b"x")
    pyarrow.parquet.write_table(table(LINED), tmp_path / "a.parquet", row_group_size=2)
    put("deep/a.parquet", (tmp_path / "a.parquet").read_bytes())
    found = sources.find_sources((url,))
    assert [s.name for s in found] == [
        "box/b.jsonl",
        "box/deep/a.jsonl.gz",
        "box/deep/a.jsonl.zst",
        "box/deep/a.parquet",
    ]
    assert all(remote.is_remote(s.path) for s in found)

    for source in found:
        for size in (20, 10**6):
            assert read(readers.cut_source(source, size, Reading()), Reading()) == wanted(
                "", LINED
            ), source
    assert (
        len(readers.cut_source(found[0], 20, Reading())) > 3
        and len(readers.cut_source(found[3], 20, Reading())) > 3
    )
    assert [s.name for s in sources.find_sources((f"{url}/*.jsonl",))] == ["b.jsonl"]
    assert [
        s.name for s in sources.find_sources((f"{url}/**/*.gz", f"{url}/b.jsonl", f"{url}/*.jsonl"))
    ] == ["a.jsonl.gz", "b.jsonl"]

    for path, message in [
        (f"{url}/none.txt", "no such file"),
        (f"{url}/*.md", "no file matches"),
        (f"{url}/deep/picture.png", "no usable files"),
    ]:
        with pytest.raises(UsageError, match=message):
            sources.find_sources((path,))
    put("b.jsonl", b"oops\n")
    with pytest.raises(UsageError, match=r"box/b.jsonl:1: not JSON"):
        read(readers.cut_source(found[0], 20, Reading()), Reading())


def test_remote_files_are_known_by_their_content(bucket, tmp_path):
    url, put = bucket
    for content in (b"one", b"two"):
        put("a.txt", content)
        (tmp_path / "b.txt").write_bytes(content)
        found = sources.find_sources((f"{url}/a.txt", str(tmp_path / "b.txt")))
        hashes = hash_sources(found, tmp_path / "cache", 1)
        assert hashes == [hashlib.sha256(content).hexdigest()] * 2
    with pytest.raises(UsageError, match=r"hf://a/b: .* gpt-jax prepare --input=hf://a/b"):
        hash_sources(sources.find_sources(("hf://a/b",)), tmp_path / "cache", 1)


@pytest.mark.parametrize(
    "error, words",
    [
        (FSTimeoutError(), "timed out"),
        (ConnectionError("reset"), "ConnectionError: reset"),
        (KeyError("x\ny"), "KeyError: "),
    ],
)
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow"]
)
def test_a_store_that_fails_while_a_file_is_read_is_no_damage_of_the_file(
    monkeypatch, name, error, words
):
    def fail(file, *_):
        raise error

    with fsspec.open(f"memory://box/{name}", "wb") as file:
        file.write(b"x" * 99)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    source = Source(f"memory://box/{name}", name)
    skip = Reading(on_error="skip")
    with pytest.raises(UsageError, match=f"memory://box/{name}: cannot be read: {words}") as told:
        read([readers.whole_piece(source)], skip)
    assert type(told.value) is UsageError and str(told.value).isprintable()
    fsspec.filesystem("memory").rm("/box", recursive=True)


def test_only_files_that_libraries_unpack_are_damaged_by_an_error_without_a_number():
    for name, kind in [
        ("a.txt", UsageError),
        ("a.txt.gz", Damaged),
        ("a.parquet", Damaged),
        ("a.arrow", Damaged),
    ]:
        with pytest.raises(UsageError, match=f"{name}: ") as told:
            with readers._damage(Source(name, name)):
                raise OSError("torn")
        assert type(told.value) is kind


def test_stores_that_cannot_be_reached(monkeypatch):
    def absent(protocol):
        raise ImportError("Install it")

    with pytest.raises(UsageError, match=r"foo://x/a.txt: Protocol not known: foo"):
        sources.find_sources(("foo://x/a.txt",))
    monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    for url, package in [("gs://box/a.txt", "gcsfs"), ("s3://box/*.txt", "s3fs")]:
        with pytest.raises(
            UsageError, match=f"the package {package}; .* -m pip install .*'{package}'"
        ):
            sources.find_sources((url,))
    with pytest.raises(UsageError, match=r"gs://box/a.txt: gs:// needs the package gcsfs"):
        read([readers.whole_piece(Source("gs://box/a.txt", "a.txt"))], Reading())


# ---- hf:// ----


@pytest.fixture
def offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_data_set(offline, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} {t}"}) + "\n" for t in LINED)
        )
    [source], reading = sources.find_sources((f"hf://{folder}",)), Reading()
    pieces = readers.cut_source(source, 1, reading)
    assert [(p.start, p.stop) for p in pieces] == [(0, 1), (1, 2), (2, -1)]

    whole = read([readers.whole_piece(source)], reading)
    assert whole == [f"{i} {t}" for i in range(3) for t in LINED] == read(pieces, reading)
    assert len({d.name for d in readers.read_documents(pieces, reading)}) == len(whole)
    with pytest.raises(UsageError, match=r"'body' .* is missing; fields there: text"):
        read(pieces, Reading("body"))

    (folder / "2.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UsageError, match=f"hf://{folder}: "):
        read(pieces, reading)

    for path, message in [
        (f"hf://{tmp_path}/none", "none"),
        (f"hf://{folder}@dev", "dev.*train"),
        (f"hf://{folder}:big", "big"),
        ("hf://", "names no data set"),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            read([readers.whole_piece(*sources.find_sources((path,)))], reading)
        assert "\n" not in str(error.value)


def test_words_of_the_library_are_one_line(offline, monkeypatch):
    def broken(*_, **__):
        raise ValueError("first\n  second")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(UsageError, match=r"^hf://a/b: first second$"):
        read([readers.whole_piece(Source("hf://a/b", "hf://a/b"))], Reading())


def test_names_of_data_sets(monkeypatch, tmp_path):
    assert hub.parse_name("hf://org/name") == ("org/name", None, "train", None)
    assert hub.parse_name("hf://org/name:20231101.zh@test") == (
        "org/name",
        "20231101.zh",
        "test",
        None,
    )
    assert hub.parse_name("hf://org/name@test#refs/pr/1") == ("org/name", None, "test", "refs/pr/1")
    assert hub.parse_name("hf:///data/c#/set@dev") == ("/data/c#/set", None, "dev", None)

    for name in ("set:one", "set@two", "set"):
        (tmp_path / name).mkdir()
        path = str(tmp_path / name)
        assert hub.parse_name(f"hf://{path}") == (path, None, "train", None)
        assert hub.parse_name(f"hf://{path}@dev") == (path, None, "dev", None)
    assert hub.parse_name(f"hf://{tmp_path}/set:zh@dev")[:3] == (f"{tmp_path}/set", "zh", "dev")

    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"-m pip install .*'datasets'"):
        readers.cut_source(Source("hf://a/b", "hf://a/b"), 1, Reading())


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.jsonl.bz2", "a.parquet", "a.txt.gz"]
)
def test_the_rest_of_a_damaged_file_is_an_error_or_counted(tmp_path, name):
    """The files after it are read in either case."""
    rows = [f"{i} " + "".join(random.Random(i).choices("abcdefgh", k=400)) for i in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / name)
    else:
        pack = {
            ".gz": gzip.compress,
            ".xz": lzma.compress,
            ".bz2": bz2.compress,
            ".zst": lambda raw: bytes(pyarrow.compress(raw, "zstd", asbytes=True)),
        }[name[name.rindex(".") :]]
        (tmp_path / name).write_bytes(pack(lines))
    torn = tmp_path / name
    torn.write_bytes(torn.read_bytes()[: -torn.stat().st_size // 3])
    (tmp_path / "b.jsonl").write_text('{"text": "after"}\n')
    found = sources.find_sources((str(tmp_path),))
    with pytest.raises(UsageError, match=rf"{name}: .*; copy it again, or .*--on_error=skip"):
        read(
            [piece for source in found for piece in readers.cut_source(source, 1 << 30, Reading())],
            Reading(),
        )

    skip = Reading(on_error="skip")
    tally = Tally()
    got = read(
        [piece for source in found for piece in readers.cut_source(source, 1 << 30, skip)],
        skip,
        tally,
    )
    whole = [text for text in got[:-1] if name.startswith("a.jsonl")]
    assert got == [*whole, "after"] and whole == rows[: len(whole)] and len(whole) < 3900
    assert (
        tally.skipped == 1
        and f"{name}: " in tally.places[0]
        and "the rest of the file is left out" in tally.places[0]
    )
    assert len(whole) > 100 or name in ("a.parquet", "a.txt.gz", "a.jsonl.bz2")


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


@pytest.mark.parametrize("documents", ["file", "line"])
def test_the_mark_of_utf8_at_the_start_of_a_file_is_no_text(tmp_path, documents):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    [source] = sources.find_sources((str(tmp_path / "a.txt"),))
    reading = Reading(documents=documents)
    assert (
        "".join(read(readers.cut_source(source, 1, reading), reading)).replace("\n", "")
        == "one\ufefftwo"
    )
