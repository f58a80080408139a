"""How many files are open, and what is said when no more may be."""

import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest

from gpt_jax import files
from gpt_jax.data.tokens import open_files
from gpt_jax.data.tokens.foreign import open_foreign
from gpt_jax.data.tokens.shards import TokenFile
from gpt_jax.errors import UsageError

LIMIT = resource.RLIMIT_NOFILE


@pytest.fixture
def shards(tmp_path):
    """Files of one id each, which is their number."""
    found = []
    for number in range(200):
        path = tmp_path / f"{number}.tokens"
        np.array([number], np.uint16).tofile(path)
        found.append(TokenFile(path, np.dtype(np.uint16), 1))
    return found


@pytest.fixture
def tight():
    """A soft limit that leaves room for 100 files beside those that are open now."""
    soft, hard = resource.getrlimit(LIMIT)
    resource.setrlimit(LIMIT, (len(os.listdir("/proc/self/fd")) + 100, hard))
    yield
    resource.setrlimit(LIMIT, (soft, hard))


def read_all(shards, threads):
    """The ids of all shards, read by each of several threads at once."""
    together = Barrier(threads)

    def read(_):
        together.wait()
        out = np.zeros(1, np.uint16)
        ids = []
        for shard in [*shards, *shards]:
            shard.read(0, out)
            ids.append(int(out[0]))
        return ids

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, range(threads)))


def test_the_soft_limit_is_raised(shards, tight):
    before = resource.getrlimit(LIMIT)[0]
    assert read_all(shards, 4) == [[*range(200)] * 2] * 4
    assert resource.getrlimit(LIMIT)[0] > before


def test_threads_share_a_limit_that_cannot_be_raised(shards, tight, monkeypatch):
    def stays():
        return resource.getrlimit(LIMIT)[0]

    monkeypatch.setattr(open_files, "allow_open_files", stays)
    assert read_all(shards, 8) == [[*range(200)] * 2] * 8


def test_threads_that_come_one_after_another_have_what_is_left(shards, tight, monkeypatch):
    """Each fills its share before the next one comes, and nobody gives back in between."""
    limit = resource.getrlimit(LIMIT)[0]
    monkeypatch.setattr(open_files, "allow_open_files", lambda: limit)
    before = len(os.listdir("/proc/self/fd"))
    turns = [Event() for _ in range(9)]
    is_over = Event()

    def read(number):
        turns[number].wait()
        out = np.zeros(1, np.uint16)
        for shard in shards:
            shard.read(0, out)
        turns[number + 1].set()
        is_over.wait()

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(read, number) for number in range(8)]
        turns[0].set()
        turns[8].wait(60)
        opened = len(os.listdir("/proc/self/fd")) - before
        is_over.set()
        for future in done:
            future.result()
    assert 8 <= opened <= limit // 4 + 8


def test_files_of_threads_that_have_ended_are_closed(shards):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_all(shards, 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert len(open_files.OPENED.threads) <= 2


def test_a_shortage_is_no_damage(shards, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(open_files, "open", fail, raising=False)
    words = r"too many open files: the limit is [\d,]+; raise it, as with ulimit -n"
    with pytest.raises(UsageError, match=words):
        shards[0].read(0, np.zeros(1, np.uint16))

    np.array([1, 2], np.uint16).tofile(tmp_path / "a.bin")
    monkeypatch.setattr("gpt_jax.data.tokens.foreign.np.memmap", fail)
    with pytest.raises(UsageError, match=words):
        open_foreign(tmp_path / "a.bin")


def test_other_errors_keep_their_words():
    assert files.describe_error(OSError(errno.ENOENT, "No such file")) == "No such file"
    assert files.describe_error(OSError("of\nno number")) == "of no number"
    assert files.allow_open_files() <= files.OPEN_FILES
