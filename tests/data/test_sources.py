"""Files to documents: formats, order, and one clear line for every kind of unusable input."""

import json
import lzma

import prepared
import pyarrow
import pyarrow.parquet
import pytest
from packings import pack

from gpt_jax import config
from gpt_jax.commands import inspect
from gpt_jax.data.read import documents, formats, remote, sources, unpacking
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.vocabulary import FIM_TOKENS, make_byte_tokenizer, with_specials
from gpt_jax.errors import UsageError

TEXT = "first\r\nsecond\u2028third\x85 我\n\n\ttail "


def read(*paths, field="text", errors="strict"):
    found = map(documents.whole_piece, sources.find_sources(tuple(map(str, paths))))
    return list(documents.read_documents(found, Reading(field, errors)))


@pytest.mark.parametrize("packing", sources.COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".py", ".jsonl"])
def test_text_comes_out_exactly(tmp_path, kind, packing):
    rows = [TEXT, "", "two"]
    path = tmp_path / f"a{kind}{packing}"
    if kind == ".jsonl":
        raw = (
            "\n".join(
                json.dumps({"id": i, "text": t}, ensure_ascii=False) for i, t in enumerate(rows)
            )
            + "\n\n"
        )
        path.write_bytes(pack(raw.encode(), packing))
        assert [(d.name, d.text) for d in read(path)] == [
            (f"{path.name}:1", TEXT),
            (f"{path.name}:3", "two"),
        ]
    else:
        path.write_bytes(pack(TEXT.encode(), packing))
        assert [(d.name, d.text, d.replaced) for d in read(path)] == [(path.name, TEXT, 0)]


def test_parquet(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3], "body": [TEXT, "", "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [(d.name, d.text) for d in read(tmp_path, field="body")] == [
        (f"{tmp_path.name}/a.parquet:1", TEXT),
        (f"{tmp_path.name}/a.parquet:3", "two"),
    ]
    with pytest.raises(
        UsageError,
        match=r"a.parquet: config.data.field = 'text' .* missing; columns there: id, body",
    ):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"config.data.field = 'id' .* holds int64, expected text"):
        read(tmp_path, field="id")

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a.parquet:2: .* is null"):
        read(tmp_path)

    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"a.parquet: not a readable parquet file"):
        read(tmp_path)


def test_folders_globs_and_order(tmp_path):
    for name in (
        "b.txt",
        "a/z.md",
        "a/b.py",
        "a.txt",
        ".hidden.txt",
        ".git/x.txt",
        "a/picture.png",
        "c.rst",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    names = [s.name.partition("/")[2] for s in sources.find_sources((str(tmp_path),))]
    assert names == ["a/b.py", "a/z.md", "a.txt", "b.txt"]
    assert [d.text for d in read(tmp_path / "*.txt")] == ["a.txt", "b.txt"]
    assert [d.text for d in read(tmp_path / "**/*.md")] == ["a/z.md"]

    several = read(tmp_path / "b.txt", tmp_path, tmp_path / "a*", tmp_path / "a/../b.txt")
    assert [d.text for d in several] == ["b.txt", "a/b.py", "a/z.md", "a.txt"]


def test_standard_library_has_no_tests():
    found = sources.find_sources(("stdlib",))
    assert len(found) > 200 and {"stdlib/json/decoder.py", "stdlib/argparse.py"} <= {
        s.name for s in found
    }
    assert not any(
        {"test", "tests", "site-packages", "idle_test"} & set(s.name.split("/")) for s in found
    )
    assert (
        sum(1 for _ in documents.read_documents(map(documents.whole_piece, found), Reading())) > 200
    )


def test_undecodable(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xef\xbf\xbd text \xff\xfe end \xe6")
    with pytest.raises(
        UsageError, match=r"a.txt: not UTF-8 at byte 14 \(0xff\).*--config.data.errors=replace"
    ):
        read(path)

    [document] = read(path, errors="replace")
    assert document.text == "good \ufffd text \ufffd\ufffd end \ufffd" and document.replaced == 3

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match=r"a.jsonl:2: not UTF-8 at byte 25"):
        read(path)
    assert [(d.text, d.replaced) for d in read(path, errors="replace")] == [
        ("ok", 0),
        ("\ufffd", 1),
    ]

    path.write_text(r'{"text": "a\ud800b \ud83d\udc4d"}')
    with pytest.raises(UsageError, match=r"a.jsonl:1: character 1 is a lone surrogate"):
        read(path)
    assert [(d.text, d.replaced) for d in read(path, errors="replace")] == [("a\ufffdb 👍", 1)]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": 1}', r"a.jsonl:2: config.data.field = 'text' .* holds int, expected text"),
        (
            '{"body": "x", "id": 3}',
            r"a.jsonl:2: config.data.field = 'text' .* is missing; fields there: body, id",
        ),
        ("[1]", "a.jsonl:2: expected a JSON object, got list"),
        ('{"text": "x"', "a.jsonl:2: not JSON"),
        ("[" * 100_000, "a.jsonl:2: not JSON"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.jsonl")


def test_binary_file_among_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\r\n\0\0")
    for errors in ("strict", "replace"):
        with pytest.raises(UsageError, match=r"b.txt: byte 6 is NUL, so this is a binary file"):
            read(tmp_path, errors=errors)


@pytest.mark.parametrize("packing", sources.COMPRESSIONS[1:])
def test_incomplete_or_damaged_archive(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    raw = pack(TEXT.encode() * 50, packing)
    for damaged in (raw[:-3], raw[: len(raw) // 2 - 3], b"this is no archive", raw + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(
            UsageError, match=f"a.txt{packing}: a damaged or incomplete {packing} file"
        ):
            read(path)


@pytest.mark.parametrize("packing", sources.COMPRESSIONS[1:])
def test_what_follows_a_stream_is_read_or_refused(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    first = pack(b"first ", packing)
    second = pack(b"second", packing)
    flipped = bytes([second[0] ^ 1]) + second[1:]

    for damaged in (
        first + flipped,
        first + b"garbage",
        first + b"\0" * 8 + b"garbage",
        first + second[:-1],
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            UsageError, match=f"a.txt{packing}: a damaged or incomplete {packing} file"
        ):
            read(path)


def test_xz_streams_may_have_padding_by_fours(tmp_path):
    path = tmp_path / "a.txt.xz"
    first = lzma.compress(b"first " * 99_999)
    second = lzma.compress(b"second")

    for padding in (0, 4, 8, 400_000):
        for after in (0, 400_000):
            path.write_bytes(first + b"\0" * padding + second + b"\0" * after)
            assert [d.text for d in read(path)] == ["first " * 99_999 + "second"]
        for wrong in (first + b"\0" * (padding + 3) + second, first + b"\0" * (padding + 1)):
            path.write_bytes(wrong)
            with pytest.raises(UsageError, match="neither padding nor another one"):
                read(path)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("gone.txt")
    (tmp_path / "picture.png").symlink_to("gone.png")  # of no concern
    for path in (tmp_path, tmp_path / "*.txt", tmp_path / "b.txt"):
        with pytest.raises(
            UsageError,
            match=r"b.txt: is a link to gone.txt, which is not there; remove the link, or name",
        ):
            sources.find_sources((str(path),))
    (tmp_path / "folder").symlink_to("nowhere")
    with pytest.raises(UsageError, match="folder: is a link to nowhere, which is not there"):
        sources.find_sources((str(tmp_path / "folder"),))
    with pytest.raises(UsageError, match="folder: is a link to nowhere"):  # perhaps of texts
        (tmp_path / "gone.txt").write_text("there")
        sources.find_sources((str(tmp_path),))
    (tmp_path / "folder").unlink()

    (tmp_path / "gone.txt").write_text("there")
    assert [d.text for d in read(tmp_path)] == ["text", "there"]


def test_linked_folders_are_read_as_a_glob_reads_them(tmp_path):
    data = tmp_path / "data"
    for name in ("data/z/a.txt", "data/b.txt", "other/more/c.txt", "other/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (data / "a").symlink_to("z")
    (data / "linked").symlink_to(tmp_path / "other")
    (data / ".hidden").symlink_to("/")

    by_folder = sources.find_sources((str(data),))
    by_glob = sources.find_sources((str(data / "**/*.txt"),))
    assert {s.path.resolve() for s in by_folder} == {s.path.resolve() for s in by_glob}
    assert [source.name for source in by_folder] == [
        "data/b.txt",
        "data/linked/d.txt",
        "data/linked/more/c.txt",
        "data/z/a.txt",
    ]

    by_url = sources.find_sources((f"file://{data}/",))
    assert [source.name for source in by_url] == [source.name for source in by_folder]

    # Links in a circle add nothing.
    (data / "round").symlink_to(".")
    (data / "z/up").symlink_to("..")
    (tmp_path / "other/back").symlink_to(data)
    assert sources.find_sources((str(data),)) == by_folder


def test_a_data_set_as_path_is_refused_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "exists", lambda url: pytest.fail(f"asks for {url}"))
    for name in ("org/name", str(tmp_path)):
        for given in (dict(path=(f"hf://{name}",)), dict(sources=(("a", f"hf://{name}", 1.0),))):
            with pytest.raises(
                UsageError,
                match=f"hf://{name}: .* run gpt-jax prepare --input=hf://{name} --output=DIR",
            ):
                dataset.load_dataset(
                    config.Data(cache=str(tmp_path / "cache"), **given), lambda line: None
                )


def test_every_kind_and_packing_is_read():
    assert set(formats.FORMATS) == {*sources.SUFFIXES, *sources.NAMED_ONLY, sources.HUB} and set(
        unpacking.UNPACK
    ) == set(sources.COMPRESSIONS[1:])


def test_paths_that_cannot_be_used(tmp_path):
    (tmp_path / "a.rst").write_text("x")
    for path, message in [
        ((), "config.data.path is empty"),
        ((str(tmp_path / "none"),), r"none': no such file or directory$"),
        ((str(tmp_path / "none"), "1.txt"), r"none': no such file or directory; a comma separates"),
        ((str(tmp_path / "*.txt"),), r"\*.txt': no file matches"),
        ((str(tmp_path),), r"no usable files; read are .txt .md .py .jsonl .json .csv"),
        ((str(tmp_path / "a.rst"),), "a.rst': no usable files"),
        ((str(tmp_path / "*"),), "no usable files"),
    ]:
        with pytest.raises(UsageError, match=message):
            sources.find_sources(path)

    with pytest.raises(UsageError, match=r"config.data.eval_path = "):
        sources.find_sources(("nowhere",), "config.data.eval_path")


def test_fill_in_the_middle_of_a_folder_without_its_tokens_is_prepared_again(tmp_path):
    source = prepared.write_jsonl(tmp_path / "a.jsonl", prepared.texts(9))
    folder = prepared.prepare(tmp_path / "out", f"--input={source}")
    for given in (dict(path=(str(folder),)), dict(sources=(("text", str(folder), 1.0),))):
        with pytest.raises(
            UsageError, match=rf"prepare {folder} again with --tokenizer=bytes\+fim"
        ):
            dataset.load_dataset(config.Data(fim=0.5, **given), lambda line: None)


def test_inspect_shows_special_tokens_where_they_stand():
    tokenizer = with_specials(make_byte_tokenizer(), FIM_TOKENS)
    ids = [
        tokenizer.specials[FIM_TOKENS[0]],
        *"é".encode(),
        tokenizer.specials[FIM_TOKENS[1]],
        97,
        tokenizer.eot,
    ]
    assert inspect.with_specials(tokenizer, ids) == f"{FIM_TOKENS[0]}é{FIM_TOKENS[1]}a<|endoftext|>"
