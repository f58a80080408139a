"""Shards and indexes that are replaced before a run and during it."""

import json
import os
import time

import numpy as np
import pytest
from prepared import prepare, texts, write_jsonl
from streams import make_stream

from gpt_jax import config
from gpt_jax.data.stream import dataset
from gpt_jax.data.stream.batches import make_eval_batches
from gpt_jax.data.tokens import corpus, guard
from gpt_jax.data.tokens.guard import Guard, share_files
from gpt_jax.errors import DataError

WRONG = r"train-0000\d.tokens: its checksum is wrong, so it was damaged or replaced"


@pytest.fixture
def made(tmp_path):
    """A prepared folder of several shards."""
    rows = write_jsonl(tmp_path / "a.jsonl", texts(150))
    return prepare(tmp_path / "out", f"--input={rows}", "--eval_fraction=0.2", "--piece_mb=0.005")


def knobs_for(made, **changes) -> config.Data:
    return config.Data(path=(str(made),), cache=str(made.parent / "cache"), **changes)


def start(made, rows=slice(0, 4), **changes):
    """A stream of batches of four rows."""
    knobs = knobs_for(made, **changes)
    data = dataset.load_dataset(knobs, lambda line: None)
    return make_stream(data, knobs, 16, 4, 0, rows)


def replace_content(path):
    """Writes other content of the same size into a file, and gives the old one."""
    raw = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(bytes([65, 0]) * (len(raw) // 2))
    return raw


def read_until_refused(stream, seconds=20.0):
    """Reads batches until one is refused."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        next(stream)
        time.sleep(0.01)


def test_offsets_of_a_running_stream_do_not_change_with_their_file(made):
    def take(stream, count):
        return [next(stream) for _ in range(count)]

    stream = start(made, document_mask=True)
    wanted = take(stream, 40)
    stream.close()

    stream = start(made, document_mask=True)
    rows = take(stream, 2)
    offsets = made / "text/train.offsets"
    offsets.write_bytes(b"\xff" * offsets.stat().st_size)
    rows += take(stream, 19)
    os.truncate(offsets, 0)
    rows += take(stream, 19)
    stream.close()
    for row, other in zip(rows, wanted, strict=True):
        for name, column in row.items():
            assert np.array_equal(column, other[name]), name

    with pytest.raises(DataError, match=r"train.offsets: has 0 bytes"):
        start(made)


def test_offsets_with_another_content_are_refused_at_the_start(made):
    """The borders still rise from 0 to the end, so only their checksum tells."""
    path = made / "text/train.offsets"
    offsets = np.fromfile(path, np.int64)
    offsets[1:-1] += 1
    offsets.tofile(path)
    with pytest.raises(DataError, match=r"train.offsets does not fit its meta"):
        start(made)


def test_records_that_are_cut_during_a_run_are_damage(made):
    tokens = corpus.open_corpus(made).sources["text"]["train"]
    name = tokens.document_name(3)
    os.truncate(made / "text/train.docs", 24 * 4)
    assert tokens.document_name(3) == name
    with pytest.raises(DataError, match=r"train.docs: changed since it was opened"):
        tokens.document_name(4)


def test_a_shard_replaced_before_a_start_is_refused(made):
    path = made / "text/train-00001.tokens"
    raw = replace_content(path)
    with pytest.raises(DataError, match=WRONG):
        start(made)

    path.write_bytes(raw)
    stream = start(made)
    next(stream)
    stream.close()


def test_a_shard_replaced_during_a_run_ends_it(made, monkeypatch):
    monkeypatch.setattr(guard, "WATCH_SECONDS", 0.02)
    stream = start(made)
    next(stream)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    replace_content(made / "text/train-00000.tokens")
    with pytest.raises(DataError, match=WRONG):
        read_until_refused(stream)
    stream.close()


def test_much_is_hashed_beside_the_run(made, monkeypatch):
    monkeypatch.setattr(guard, "AT_ONCE", 0)
    replace_content(made / "text/train-00002.tokens")
    stream = start(made)
    with pytest.raises(DataError, match=WRONG):
        read_until_refused(stream)
    stream.close()


def test_held_out_shards_are_looked_at_too(made):
    knobs = knobs_for(made)
    data = dataset.load_dataset(knobs, lambda line: None)
    batches = make_eval_batches(
        data.heldout["text"], data.tokenizer, knobs, 16, 4, slice(0, 4), limit=2
    )
    assert len(list(batches)) == 2
    time.sleep(0.02)
    replace_content(next((made / "text").glob("eval-*.tokens")))
    with pytest.raises(DataError, match="its checksum is wrong"):
        list(batches)


def test_what_is_whole_is_remembered_until_it_changes(made, monkeypatch):
    monkeypatch.setattr(guard, "SETTLED_NS", 0)
    hashed = []
    hash_file = Guard._hash
    monkeypatch.setattr(
        Guard, "_hash", lambda self, file: (hashed.append(file.path.name), hash_file(self, file))
    )
    start(made).close()
    shards = sorted(path.name for path in (made / "text").glob("train-*.tokens"))
    assert sorted(hashed) == shards and len(shards) > 2
    start(made).close()
    assert len(hashed) == len(shards)

    time.sleep(0.02)
    os.utime(made / "text" / shards[0])
    start(made).close()
    assert sorted(hashed) == sorted([*shards, shards[0]])

    [memory] = (made.parent / "cache").glob("*.verified")
    for damaged in ("[1, 2", json.dumps({str(made / "text" / shards[0]): [1]}), '{"a": 1}'):
        hashed.clear()
        memory.write_text(damaged)
        start(made).close()
        assert len(hashed) == len(shards), damaged


def test_a_memory_with_short_rows_is_no_trouble(made):
    """The file that a row is about cannot be read, so nothing puts another row in its place."""
    train = corpus.open_corpus(made).sources["text"]["train"]
    files = share_files([train], 0, 1)
    root = made.parent / "cache"
    Guard(files, root).close()
    [memory] = root.glob("*.verified")
    memory.write_text(json.dumps({str(files[0].path): [1]}))
    files[0].path.unlink()
    Guard(files, root).close()


def test_a_folder_whose_name_is_no_text(made):
    odd = made.rename(made.parent / os.fsdecode(b"caf\xe9"))
    stream = start(odd)
    next(stream)
    stream.close()
    assert list((odd.parent / "cache").glob("*.verified"))


def test_processes_share_the_files(made):
    train = corpus.open_corpus(made).sources["text"]["train"]
    for parts in (1, 2, 3, 50):
        shares = [share_files([train], part, parts) for part in range(parts)]
        assert {file for share in shares for file in share} == set(train.shards)
        assert sum(map(len, shares)) == len(train.shards)


def test_shards_of_a_cache_are_looked_at(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 500)
    knobs = config.Data(path=(str(tmp_path / "a.txt"),), cache=str(tmp_path / "cache"))
    data = dataset.load_dataset(knobs, lambda line: None)
    make_stream(data, knobs, 16, 4, 0, slice(0, 4)).close()
    [shard] = (tmp_path / "cache").glob("*/train.tokens")
    replace_content(shard)
    data = dataset.load_dataset(knobs, lambda line: None)
    with pytest.raises(DataError, match=r"train.tokens: its checksum is wrong.*delete a cache"):
        make_stream(data, knobs, 16, 4, 0, slice(0, 4))
