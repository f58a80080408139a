"""Token files are used again or rebuilt, and never half of one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import forks
import numpy as np
import pytest
from cached_texts import WORDS, data_for, ids, prepare, quiet, texts
from streams import make_stream

from gpt_jax import config
from gpt_jax.data.stream import dataset
from gpt_jax.data.tokenizers.bpe import train_bpe
from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.data.tokens import cache, hashes, split, store
from gpt_jax.data.tokens.hashes import hash_sources
from gpt_jax.errors import DataError, UsageError


def test_found_again_and_rebuilt_when_the_source_or_settings_change(folder, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    builds, write = [], store.write_cache
    monkeypatch.setattr(store, "write_cache", lambda *a: (builds.append(a[0]), write(*a)))
    data = data_for(folder)
    first = prepare(data, quiet)
    assert (ids(prepare(data, quiet).train) == ids(first.train)).all() and len(builds) == 1
    path = folder / "text" / "00.txt"
    old = path.stat()
    path.write_text("X" + path.read_text()[1:])  # the same size
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert (
        texts((changed := prepare(data, quiet)).train, changed.tokenizer)[0][0] == "X"
        and len(builds) == 2
    )
    os.utime(path, ns=(0, 0))  # another time alone is no other content
    for _ in range(2):
        prepare(data, quiet)
    assert len(builds) == 2 and len(list((folder / "cache").glob("*.stamps"))) == 1
    for changes in ({"tokenizer": "bpe:260"}, {"eval_fraction": 0.5}, {"split": "document"}):
        prepare(data_for(folder, **changes), quiet)
    assert len(builds) == 5


def test_content_with_its_old_time_is_another_content(folder, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    found = cache.sources.find_sources((str(folder / "text"),))
    first = hash_sources(found, folder / "cache", 1)
    read = []
    digest = hashes.digest_file
    monkeypatch.setattr(hashes, "digest_file", lambda path: read.append(path) or digest(path))
    assert hash_sources(found, folder / "cache", 1) == first and read == []

    path = found[3].path
    old = path.stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    with open(path, "r+b") as file:
        file.write(b"?")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    second = hash_sources(found, folder / "cache", 1)
    assert read == [path.resolve()]
    assert [i for i in range(len(found)) if second[i] != first[i]] == [3]


def test_hashes_are_taken_over_only_for_settled_files(folder):
    found = cache.sources.find_sources((str(folder / "text"),))
    fresh = hash_sources(found, folder / "cache", 1)
    path = found[0].path
    stat = path.stat()
    path.write_text("Y" + path.read_text()[1:])
    os.utime(
        path, ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # a change that hides in the clock's grain
    assert hash_sources(found, folder / "cache", 1)[0] != fresh[0]


def note_digests(folder, digests):
    """Puts other digests into the meta of a cache."""
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["digests"]
    (folder / "meta.json").write_text(json.dumps(meta | {"digests": digests}))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda f: os.truncate(f / "train.tokens", 10), "train.tokens has 10 bytes"),
        (lambda f: (f / "meta.json").unlink(), "cannot be read"),
        (lambda f: (f / "meta.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "meta.json").write_text("[" * 200_000), "nested too deeply"),
        (lambda f: (f / "meta.json").write_text('{"format": 3}'), "dtype: missing"),
        (lambda f: note_digests(f, []), "digests: expected an object"),
        (lambda f: note_digests(f, {"train": {".tokens": [1]}}), "a list of 2 entries"),
        (lambda f: (f / "origins.json").write_text("[[1, 0, true]]"), "expected a text, got 1"),
        (
            lambda f: (f / "tokenizer.json").write_text('{"kind": "z", "name": "", "content": ""}'),
            "kind: expected",
        ),
        (lambda f: os.truncate(f / "eval.offsets", 8), "eval.offsets has 8 bytes"),
        (
            lambda f: (f / "tokenizer.json").write_text(make_char_tokenizer("ab").to_json()),
            "holds another tokenizer",
        ),
    ],
)
def test_a_damaged_cache_is_rebuilt_and_said(folder, damage, reason):
    first = prepare(data_for(folder), quiet)
    whole = np.array(ids(first.train))
    damage(first.folder)
    lines = []
    assert (ids(prepare(data_for(folder), lines.append).train) == whole).all()
    assert any(reason in line and "it is built again" in line for line in lines)


KILLED = """
import sys
import time

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer
from gpt_jax.data.tokens import cache, shards

write_file = shards.write_file


def slow(path, content):
    write_file(path, content)
    print(path.name, flush=True)
    time.sleep(60)


def told(path, content):
    print("building", path.name, flush=True)
    return write_file(path, content)


shards.write_file = {"slow": slow, "fast": told}[sys.argv[3]]
data = config.Data(path=(sys.argv[1],), cache=sys.argv[2])
got = cache.prepare(data, make_byte_tokenizer(), lambda line: print(line, flush=True))
print("tokens", got.train.size)
"""


def start(folder, how):
    return forks.Popen(
        [sys.executable, "-c", KILLED, str(folder / "text"), str(folder / "cache"), how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=forks.ROOT,
        env=os.environ | {"PYTHONPATH": str(forks.ROOT)},
    )


def test_a_lock_that_is_a_link_empties_nothing(folder):
    data = data_for(folder)
    got = prepare(data, quiet)
    lock = got.folder.with_suffix(".lock")
    (folder / "precious").write_text("content")
    lock.unlink()
    lock.symlink_to(folder / "precious")
    shutil.rmtree(got.folder)
    with pytest.raises(UsageError, match=r"config.data.cache = .*symbolic link"):
        prepare(data, quiet)
    assert (folder / "precious").read_text() == "content"


def test_kill_while_building_leaves_nothing_usable(folder):
    child = start(folder, "slow")
    assert child.stdout.readline() == "train.offsets\n"  # both token files are complete by now
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [left] = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    assert left.suffix == ".building"
    with pytest.raises(store.Unusable):
        store.load_cache(left)
    got = prepare(data_for(folder), quiet)
    assert got.train.documents == 11 and not left.exists()


def test_several_processes_build_once(folder):
    first = start(folder, "slow")
    assert first.stdout.readline() == "train.offsets\n"
    others = [start(folder, "fast") for _ in range(2)]
    waiting = [child.stdout.readline() for child in others]
    assert all("waiting for another process that builds" in line for line in waiting)
    # the lock goes with its process, one of the others builds and the last one finds it
    first.kill()
    lines = [child.communicate(timeout=60)[0].splitlines() for child in others]
    results = [said[-1] for said in lines]
    assert sorted("building train.offsets" in said for said in lines) == [False, True]
    first.wait()
    first.stdout.close()
    assert results[0] == results[1] == f"tokens {prepare(data_for(folder), quiet).train.size}"


def test_a_source_that_changes_while_it_is_read(folder, monkeypatch):
    plan = split.plan_split

    def changing(*args):
        corpus = plan(*args)
        (folder / "text" / "03.txt").write_text("other")
        return corpus

    monkeypatch.setattr(split, "plan_split", changing)
    with pytest.raises(DataError, match="changed while being read"):
        prepare(data_for(folder), quiet)
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("after", ['{"text": "a"}\n', '{"text": "a"}\n' * 3, ""])
def test_documents_that_come_or_go_between_two_readings(tmp_path, after):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 2)
    data = config.Data(path=(str(tmp_path),), eval_fraction=0.5)
    corpus = split.plan_split(cache.sources.find_sources(data.path), (), data)
    (tmp_path / "a.jsonl").write_text(after)
    with pytest.raises(DataError, match="changed while being read; start again"):
        list(corpus.texts())


def test_cache_folder_that_cannot_be_used(folder, monkeypatch):
    (folder / "file").write_text("")
    with pytest.raises(UsageError, match=r"config.data.cache = .*file/x'"):
        prepare(data_for(folder, cache=str(folder / "file" / "x")), quiet)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gpt_jax.files.sync_file", full)
    with pytest.raises(
        UsageError, match=r"config.data.cache = .*No space left on device.*has room"
    ):
        prepare(data_for(folder), quiet)
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]


def test_a_token_file_that_shrinks_during_the_run(folder):
    got = prepare(data_for(folder), quiet)
    stream = make_stream(dataset.of_text(got), data_for(folder), 16, 4, 0, slice(0, 4))
    next(stream)
    os.truncate(got.folder / "train.tokens", 100)
    with pytest.raises(
        DataError, match=r"train.tokens: changed during the run: had .* and has 100;"
    ):
        for _ in range(20):
            next(stream)
    stream.close()


def test_text_for_a_tokenizer_of_a_checkpoint(folder):
    bpe = train_bpe([WORDS], 280)
    got = cache.load_text((str(folder / "text"),), bpe, data_for(folder), report=quiet)
    assert texts(got, bpe) == [path.read_text() for path in sorted((folder / "text").iterdir())]
    assert len({got.document_name(i) for i in range(got.documents)}) == got.documents == 12
    assert cache.prepare(data_for(folder), bpe, quiet).tokenizer.fingerprint == bpe.fingerprint
    with pytest.raises(UsageError, match=r"00.txt: text .*character 0, '0', is not among the 3"):
        cache.load_text(
            (str(folder / "text"),), make_char_tokenizer("abc"), data_for(folder), report=quiet
        )
    with pytest.raises(UsageError, match="--text = 'none': no such file"):
        cache.load_text(("none",), bpe, data_for(folder))


def test_settings_that_leave_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    base = {"path": (str(tmp_path / "a.txt"),), "cache": str(tmp_path / "cache")}
    with pytest.raises(UsageError, match="needs at least two different documents"):
        prepare(config.Data(**base, split="document"), quiet)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"config.data.eval_fraction = 0.1: leaves no text"):
        prepare(config.Data(**base), quiet)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"a.txt: no text in this file"):
        prepare(config.Data(**base), quiet)
    with pytest.raises(UsageError, match=r"config.data.path is empty"):
        prepare(config.Data(), quiet)


def test_undecodable_places_are_counted(folder):
    (folder / "text" / "03.txt").write_bytes(b"a\xff\xfeb")
    lines = []
    prepare(data_for(folder, errors="replace"), lines.append)
    assert any("2 undecodable places replaced" in line for line in lines)


def test_wide_vocabularies_take_four_bytes(tmp_path):
    wide = make_char_tokenizer(
        "".join(chr(i) for i in range(0x3000, 0x3000 + 2**16 + 1) if not 0xD800 <= i < 0xE000)
        + "".join(chr(0x20000 + i) for i in range(2**12))
    )
    (tmp_path / "a.txt").write_text(wide.content[-5:] * 4)
    got = cache.load_text(
        (str(tmp_path / "a.txt"),), wide, config.Data(cache=str(tmp_path / "c")), report=quiet
    )
    assert wide.vocab > 2**16 and got.dtype == np.uint32
    assert ids(got).tolist() == list(range(wide.vocab - 5, wide.vocab)) * 4
