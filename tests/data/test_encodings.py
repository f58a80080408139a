"""Text that is not UTF-8 is decoded as asked, or refused."""

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tables import read, write_table

from gpt_jax.data.read import documents as readers, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Tally
from gpt_jax.errors import UsageError


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


@pytest.mark.parametrize("documents", ["file", "line"])
def test_the_mark_of_utf8_at_the_start_of_a_file_is_no_text(tmp_path, documents):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    [source] = sources.find_sources((str(tmp_path / "a.txt"),))
    reading = Reading(documents=documents)
    assert (
        "".join(read(readers.cut_source(source, 1, reading), reading)).replace("\n", "")
        == "one\ufefftwo"
    )
