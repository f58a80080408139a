"""Texts on a store are read once, and known again by their content.

Refusals name their URL.
"""

import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import pytest
from cached_texts import WORDS, prepare, quiet, texts

from gpt_jax import config
from gpt_jax.data.read import remote
from gpt_jax.data.tokens import copies
from gpt_jax.errors import UsageError
from gpt_jax.files import hold_lock


@pytest.fixture
def opened(monkeypatch):
    """The URLs that were opened to be read, one for each time."""
    urls = []
    open_remote = remote.open_remote
    monkeypatch.setattr(remote, "open_remote", lambda url: urls.append(url) or open_remote(url))
    return urls


@pytest.fixture
def bucket(tmp_path):
    """The URL of a folder of a store with two texts, and the folder of the store."""
    memory = fsspec.filesystem("memory")
    folder = f"/{tmp_path.name}"
    memory.pipe(f"{folder}/a.txt", (WORDS * 9).encode())
    memory.pipe(f"{folder}/b.txt.gz", gzip.compress(b"packed " * 99))
    yield f"memory:/{folder}", folder
    memory.rm(folder, recursive=True)


def test_a_text_of_a_store_is_read_once(tmp_path, bucket, opened, monkeypatch):
    monkeypatch.setattr(remote, "SETTLED_SECONDS", 0)
    url, folder = bucket
    data = config.Data(path=(url,), cache=str(tmp_path / "cache"), tokenizer="bpe:280")
    first = prepare(data, quiet)
    assert sorted(opened) == [f"{url}/a.txt", f"{url}/b.txt.gz"]
    wanted = [WORDS * 9, "packed " * 99]
    assert texts(first.train, first.tokenizer) + texts(first.eval, first.tokenizer) == wanted
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}.isdisjoint(
        {"copies"}
    )

    # Neither is it read again at a later start.
    again = prepare(data, quiet)
    assert again.content == first.content and len(opened) == 2
    # Another tokenizer needs the text, and not its hash.
    prepare(replace(data, tokenizer="bytes"), quiet)
    assert len(opened) == 4

    # A changed text is another one, also with its size as before.
    fsspec.filesystem("memory").pipe(f"{folder}/a.txt", (WORDS * 9).replace("cat", "dog").encode())
    changed = prepare(data, quiet)
    assert changed.content != first.content and len(opened) == 6
    assert "dog" in texts(changed.train, changed.tokenizer)[0]


def test_a_young_text_of_a_store_is_read_at_every_start(tmp_path, bucket, opened):
    """The store has no tag of its content, so a change may hide in the grain of its clock."""
    url, _ = bucket
    data = config.Data(path=(f"{url}/a.txt",), cache=str(tmp_path / "cache"))
    first = prepare(data, quiet)
    assert prepare(data, quiet).content == first.content and len(opened) == 2
    assert remote.find_version(f"{url}/a.txt").sure is False


def test_a_tag_of_the_content_makes_a_version_sure(bucket, monkeypatch):
    url, _ = bucket
    info = fsspec.filesystem("memory").info
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")),
        "info",
        lambda self, path: info(path) | {"ETag": '"0123"'},
    )
    version = remote.find_version(f"{url}/a.txt")
    assert (
        version.sure
        and version.stamp.endswith('"0123"')
        and version.size == len(WORDS.encode()) * 9
    )


def test_refusals_of_a_text_of_a_store_name_its_url(tmp_path, bucket):
    url, folder = bucket
    fsspec.filesystem("memory").pipe(f"{folder}/bad.txt", b"a\xff")
    with pytest.raises(UsageError) as refusal:
        prepare(config.Data(path=(url,), cache=str(tmp_path / "cache")), quiet)
    assert str(refusal.value).startswith(f"{url}/bad.txt:")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_refusals_keep_their_lines_when_a_url_is_named(tmp_path, bucket):
    url, _ = bucket
    root = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(UsageError) as refusal, copies.Copies(root) as mine, mine.name_urls():
        path = mine.fetch(f"{url}/a.txt").path
        raise UsageError(f"{path}: one", f"{path}: two")
    assert refusal.value.args == (f"{url}/a.txt: one", f"{url}/a.txt: two")


def test_errors_of_a_store_are_one_line():
    with pytest.raises(UsageError) as refusal, remote.reaching("gs://a"):
        raise RuntimeError("first\n  second")
    assert str(refusal.value) == "gs://a: cannot be reached: RuntimeError: first second"


def test_processes_read_a_text_of_a_store_once(tmp_path, bucket, opened, monkeypatch):
    """Threads stand for processes here: a lock of a file is between its openings."""
    monkeypatch.setattr(remote, "SETTLED_SECONDS", 0)
    url, _ = bucket
    data = config.Data(path=(url,), cache=str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(lambda _: prepare(data, quiet).content, range(4)))
    assert len(set(contents)) == 1 and len(opened) <= 4  # to hash, and of one process to build


def test_copies_of_a_killed_process_are_removed(tmp_path, bucket):
    url, _ = bucket
    for name in ("dead", "alive"):
        (tmp_path / f"copies-{name}").mkdir()
    with hold_lock(tmp_path / "copies-alive.lock"), copies.Copies(tmp_path) as mine:
        mine.fetch(f"{url}/a.txt")
        left = sorted(path.name for path in tmp_path.glob("copies-*") if path.is_dir())
        assert len(left) == 2 and "copies-alive" in left
    assert [path.name for path in tmp_path.glob("copies-*") if path.is_dir()] == ["copies-alive"]
