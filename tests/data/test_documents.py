"""Readers: every format gives the same documents however it is cut and packed."""

import csv
import json
import pickle
import tracemalloc

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from packings import pack
from tables import LINED, TEXTS, read, table, wanted

from gpt_jax.data.read import documents as readers, formats, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.errors import UsageError


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
