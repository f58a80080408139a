"""The files of a checkpoint are compared by all processes, and the watchdog hears of it."""

import hashlib
import json
import os
import threading
import time

import pytest

from gpt_jax import files
from gpt_jax.cluster import signals, watchdog
from gpt_jax.train.checkpoint import manifest, verify


@pytest.fixture
def folder(tmp_path):
    """A sealed step of files of many sizes."""
    step = tmp_path / "10"
    (step / "params").mkdir(parents=True)
    for k in range(23):
        (step / "params" / f"{k}").write_bytes(os.urandom(k * k))
    meta = {"step": 10, "metrics": {}, "format": manifest.FORMAT}
    (step / manifest.META).write_text(json.dumps(meta))
    manifest.write_manifest(step)
    return step


def table(step) -> verify.Files:
    damage, files = manifest.look(step)
    assert damage == ""
    return files


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_each_file_is_hashed_by_one_process_and_the_bytes_are_shared_evenly(folder, count):
    files = table(folder)
    parts = verify.deal(files, count)
    assert len(parts) == count
    assert sorted(name for part in parts for name in part) == sorted(files)
    loads = [sum(files[name][0] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(size for size, _ in files.values())


def test_the_digest_is_that_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    content = os.urandom(12345)
    (tmp_path / "a").write_bytes(content)
    heard = []
    assert files.hash_file(tmp_path / "a", heard.append) == hashlib.sha256(content).hexdigest()
    assert sum(heard) == 12345 and len(heard) == 13


def compare_as(count: int, folder, monkeypatch, known=None) -> tuple[list[str], list[str]]:
    """(what each of `count` processes finds, the names that were hashed), by threads."""
    hashed = []
    plain = verify.hash_file

    def hash_file(path, tell):
        hashed.append(path.relative_to(folder).as_posix())
        return plain(path, tell)

    monkeypatch.setattr(verify, "hash_file", hash_file)
    barrier = threading.Barrier(count)
    said = [None] * count
    own = threading.local()

    def exchange(report):
        said[own.index] = report
        barrier.wait(20)
        everyone = list(said)
        barrier.wait(20)
        return everyone

    monkeypatch.setattr(verify, "exchange", exchange)
    files = table(folder)
    found = [None] * count

    def run(index):
        own.index = index
        text = (known or {}).get(index, "")
        share = verify.Share(index, count)
        found[index] = verify.compare_files(folder, {} if text else files, verify.idle, share, text)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found, hashed


def test_together_they_read_each_file_once_and_find_what_one_finds(folder, monkeypatch):
    found, hashed = compare_as(3, folder, monkeypatch)
    assert found == [""] * 3 and sorted(hashed) == sorted(table(folder))

    for name in ("7", "22"):
        path = folder / "params" / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        alone = manifest.find_damage(folder)
        assert alone.startswith(f"params/{name}: content changed (sha256 differs)")
        found, _ = compare_as(3, folder, monkeypatch)
        assert found == [alone] * 3
        path.write_bytes(content)


def test_what_only_one_process_sees_is_known_to_all(folder, monkeypatch):
    found, _ = compare_as(3, folder, monkeypatch, known={1: "params/4: missing"})
    assert found == ["params/4: missing"] * 3


def test_a_file_that_the_disk_does_not_give_back_is_damage(folder, monkeypatch):
    def fail(path, tell):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify, "hash_file", fail)
    assert manifest.find_damage(folder).startswith("manifest.json") is False
    assert "Input/output error" in manifest.find_damage(folder)


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_long_verification_is_no_hang_and_a_stuck_one_is(folder, monkeypatch, is_stuck):
    """The hashing takes several times what the watchdog allows."""
    ended = threading.Event()
    monkeypatch.setattr(signals, "end_process", lambda code, line: ended.set())
    monkeypatch.setattr(signals.faulthandler, "dump_traceback", lambda: None)
    monkeypatch.setattr(verify, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(verify, "THREADS", 1)
    plain = verify.hash_file

    def slow(path, tell):
        if is_stuck:
            ended.wait(10)
        for _ in range(4):
            time.sleep(0.02)
            tell(1)
        return plain(path, tell)

    monkeypatch.setattr(verify, "hash_file", slow)
    with watchdog(0.6 / 60) as beat:
        assert manifest.latest_valid(folder.parent, print, beat) == 10
    assert ended.is_set() == is_stuck
