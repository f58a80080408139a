"""A prepared folder on a store is copied once. What goes wrong is named."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from prepared import contents, flip

from gpt_jax.data.read import remote
from gpt_jax.data.tokens import corpus
from gpt_jax.data.tokens.mirror import is_remote_corpus, mirror
from gpt_jax.errors import DataError, UsageError


def test_a_corpus_on_a_store_is_copied_once(made, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(str(made), "/bucket/corpus", recursive=True)
    url = "memory://bucket/corpus"
    lines = []
    assert (
        is_remote_corpus(url)
        and not is_remote_corpus("memory://bucket")
        and not is_remote_corpus(str(made))
    )
    folder = mirror(url, tmp_path / "cache", lines.append)
    wanted = contents(made)
    del wanted["inputs.json"]
    assert contents(folder) == wanted and len(lines) == 1
    assert mirror(url + "/", tmp_path / "cache", lines.append) == folder and len(lines) == 1
    (folder / "corpus.json").unlink()  # as a kill leaves it
    flip(folder / "a/train-00000.tokens")
    kept = (folder / "b/train.docs").stat().st_mtime_ns
    assert contents(mirror(url, tmp_path / "cache", lines.append)) == wanted
    assert (folder / "b/train.docs").stat().st_mtime_ns == kept

    shutil.rmtree(folder)
    raw = bytearray(store.cat("/bucket/corpus/a/train.docs"))
    raw[3] ^= 1
    store.pipe("/bucket/corpus/a/train.docs", bytes(raw))
    with pytest.raises(DataError, match=r"a/train.docs: damaged"):
        mirror(url, tmp_path / "cache", lines.append)
    assert not corpus.is_corpus(folder)
    store.rm("/bucket/corpus/a/train.docs")
    with pytest.raises(UsageError, match=r"a/train.docs"):
        mirror(url, tmp_path / "cache", lines.append)


def test_of_many_processes_one_copies(made, tmp_path, monkeypatch):
    """Threads stand for processes here: a lock of a file is between its openings."""
    opened = []
    open_remote = remote.open_remote
    monkeypatch.setattr(remote, "open_remote", lambda url: opened.append(url) or open_remote(url))
    lines = []
    with ThreadPoolExecutor(4) as pool:
        folders = pool.map(
            lambda _: mirror(f"file://{made}", tmp_path / "cache", lines.append), range(4)
        )
        assert len(set(folders)) == 1
    files = [url for url in opened if not url.endswith(corpus.MANIFEST)]
    assert len(files) == len(set(files)) == len(corpus.read_manifest(made)["files"])
    assert sum("copying" in line for line in lines) == 1


@pytest.mark.parametrize(
    "where, name",
    [
        ("files", "../../escaped"),
        ("files", "/escaped"),
        ("files", "a/../../escaped"),
        ("files", "a//x"),
        ("files", "a\\..\\x"),
        ("sources", "../a"),
        ("shards", "../../../escaped"),
    ],
)
def test_a_manifest_cannot_name_files_outside_of_its_corpus(made, tmp_path, where, name):
    """Its digest is right: whoever can write to the store can seal what they like."""
    manifest = json.loads((made / corpus.MANIFEST).read_bytes())
    del manifest["digest"]
    if where == "shards":
        manifest["sources"]["a"]["train"]["shards"][0][0] = name
    elif where == "sources":
        manifest["sources"][name] = manifest["sources"].pop("a")
    else:
        first = next(iter(manifest["files"]))
        manifest["files"][name] = manifest["files"][first]
    store = fsspec.filesystem("memory")
    url = f"memory://hostile/{tmp_path.name}"
    store.put(str(made), url, recursive=True)
    store.pipe(f"{url}/{corpus.MANIFEST}", corpus.seal(manifest))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="not inside the corpus"):
        mirror(url, tmp_path / "deep" / "cache", print)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_that_fails_is_not_the_cache(made, tmp_path, monkeypatch):
    fetch = remote.open_remote
    broken = "train-00000.tokens"

    class Torn:
        def __init__(self, file):
            self.file = file
            self.left = 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            self.left -= 1
            if self.left < 0:
                raise ConnectionResetError(104, "Connection reset by peer")
            return self.file.read(5)

    monkeypatch.setattr(
        remote, "open_remote", lambda url: Torn(fetch(url)) if url.endswith(broken) else fetch(url)
    )
    for broken in ("a/train-00000.tokens", "corpus.json"):
        with pytest.raises(
            UsageError, match=f"^file://.*{broken}: cannot be reached: ConnectionResetError"
        ) as error:
            mirror(f"file://{made}", tmp_path / "cache", lambda line: None)
        assert "config.data.cache" not in str(error.value)
    broken = "nothing"
    assert corpus.is_corpus(mirror(f"file://{made}", tmp_path / "cache", lambda line: None))


def test_a_mirror_needs_room(made, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("gpt_jax.data.tokens.mirror.sync_file", full)
    with pytest.raises(UsageError, match=r"config.data.cache = .*No space left"):
        mirror(f"file://{made}", tmp_path / "cache", lambda line: None)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".lock"]
