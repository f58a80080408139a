"""Documents of object stores, on fsspec's stand-ins, and of data sets of hf://."""

import hashlib
import json

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fsspec.exceptions import FSTimeoutError
from packings import pack
from tables import LINED, read, table, wanted

from gpt_jax.data.read import documents as readers, hub, remote, sources
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.sources import Source
from gpt_jax.data.tokens.hashes import hash_sources
from gpt_jax.errors import UsageError


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
