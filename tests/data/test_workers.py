"""Engines give the same results in processes and on Ray, also when processes are killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_tasks
import pytest
from engine_tasks import die, fail, native_threads, process, square, stumble
from prepared import contents, documents, prepare, refused, texts, write_jsonl
from runs import ROOT

from gpt_jax.data.prepare.workers import ENGINES, Work
from gpt_jax.errors import DataError, PeerFailed

SECONDS = 120  # after which a process counts as stuck


def work(function, items, workers=2, tick=lambda documents, size: None) -> Work:
    return Work(function, items, workers, tick, lambda item: f"item {item}")


def test_processes_give_what_one_gives():
    seen = []
    got = dict(ENGINES["local"](work(square, list(range(20)), 3, lambda *how: seen.append(how))))
    assert (
        got
        == {i: i * i for i in range(20)}
        == dict(ENGINES["local"](work(square, list(range(20)), 1)))
    )
    assert sorted(seen) == [(1, i) for i in range(20)]
    assert list(ENGINES["local"](work(square, [], 3))) == []


def test_workers_are_processes_and_one_is_this():
    assert {pid for _, pid in ENGINES["local"](work(process, [0, 1, 2], 1))} == {os.getpid()}
    found = {pid for _, pid in ENGINES["local"](work(process, list(range(50)), 2))}
    assert 1 <= len(found) <= 2 and os.getpid() not in found
    for pid in found:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("items, threads", [([0, 1], 0), ([0], 3)])
def test_workers_share_the_threads_of_the_library(items, threads):
    """Two of two workers encode on their own thread. One of three workers alone has three."""
    found = [
        count for _, count in ENGINES["local"](work(native_threads, items, 3 if threads else 2))
    ]
    assert found == [threads] * len(items)


@pytest.mark.parametrize(
    "function, error, words",
    [
        (fail, DataError, "item 2 is bad"),
        (stumble, RuntimeError, "IndexError"),
        (die, PeerFailed, "killed by signal 9 at item 2; what is finished stays"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_said_here(function, error, words):
    with pytest.raises(error) as found:
        list(ENGINES["local"](work(function, [0, 1, 2, 3])))
    assert words in str(found.value)


def command(output: Path, *given, workers=2) -> list[str]:
    return [
        sys.executable,
        "-m",
        "gpt_jax",
        "prepare",
        f"--output={output}",
        f"--workers={workers}",
        *map(str, given),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """Starts a command in a process group of its own, where Ctrl-C counts.

    A suite that runs in the background would have it ignored.
    """

    def hear():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(log, "ab") as out:
        return subprocess.Popen(
            arguments,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=hear,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        )


def children(pid: int) -> list[int]:
    """The workers of a command: its children without the one of multiprocessing itself."""
    found = [
        int(p)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for p in (task / "children").read_text().split()
    ]
    workers = []
    for p in found:
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            workers += [p] if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes() else []
    return workers


def done(output: Path) -> dict[str, int]:
    """The shards whose marker is there, with the time at which they were written."""
    found = {}
    for marker in (output / "work").glob("tokens-*.json"):
        for name in json.loads(marker.read_bytes())["files"]:
            if name.endswith(".tokens"):
                found[name] = (output / name).stat().st_mtime_ns
    return found


def until(process: subprocess.Popen, reached, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)


def test_killed_at_random_moments(tmp_path):
    """All processes are killed, or the parent alone, whose workers must not outlive it.

    Finished work is not done again, and the output is that of an undisturbed call.
    """
    write_jsonl(tmp_path / "in.jsonl", texts(3000))
    given = [
        f"--input={tmp_path / 'in.jsonl'}",
        "--piece_mb=0.008",
        "--eval_fraction=0.3",
        "--tokenizer=bpe:300",
    ]
    wanted = contents(prepare(tmp_path / "wanted", *given))
    assert len(wanted) > 80

    out = tmp_path / "out"
    log = tmp_path / "log"
    draw = random.Random(0)
    before: dict[str, int] = {}
    for kill in (os.killpg, os.kill, os.killpg):
        running = start(command(out, *given), log)
        until(running, lambda: len(done(out)) >= len(before) + 8, log)
        time.sleep(draw.random() / 20)
        workers = children(running.pid)
        kill(running.pid, signal.SIGKILL)
        running.wait()
        end = time.monotonic() + SECONDS
        while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
            assert time.monotonic() < end, "workers live on"
            time.sleep(0.002)
        now = done(out)
        assert workers and now.items() >= before.items() and len(now) < len(wanted)
        before = now
    prepare(out, *given)
    assert contents(out) == wanted
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_a_killed_worker_is_one_line_and_loses_one_unit(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", texts(4000))
    given = [
        f"--input={tmp_path / 'in.jsonl'}",
        "--piece_mb=0.008",
        "--filters=engine_tasks:slowly",
    ]
    out = tmp_path / "out"
    log = tmp_path / "log"
    running = start(command(out, *given), log)
    until(running, lambda: len(done(out)) >= 3 and len(children(running.pid)) == 2, log)
    os.kill(children(running.pid)[0], signal.SIGKILL)
    assert running.wait(SECONDS) == 40

    lines = [line for line in log.read_text().splitlines() if line.startswith("gpt-jax: ")]
    assert len(lines) == 1 and "killed by signal 9" in lines[0] and "in.jsonl" in lines[0], (
        log.read_text()
    )

    before = done(out)
    assert len(before) >= 3 and documents(prepare(out, *given))["text"]["train"] == texts(4000)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_workers_end_with_their_parent(tmp_path):
    """They end at once, and not when their unit ends."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import engine_tasks\nfrom gpt_jax.data.prepare.workers import ENGINES, Work\n\n"
        "if __name__ == '__main__':\n    list(ENGINES['local'](Work(engine_tasks.linger, [0, 1], "
        "2, lambda documents, size: print('at work', flush=True), str)))\n"
    )
    log = tmp_path / "log"
    with open(log, "wb") as out:
        running = subprocess.Popen(
            [sys.executable, script],
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        )
    until(running, lambda: log.read_text().count("at work") == 2, log)
    workers = children(running.pid)
    running.kill()
    running.wait()
    end = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.002)

    assert len(workers) == 2


@pytest.mark.parametrize(
    "send", [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)]
)
def test_interrupted_is_code_10_and_goes_on(tmp_path, send):
    write_jsonl(tmp_path / "in.jsonl", texts(4000))
    given = [
        f"--input={tmp_path / 'in.jsonl'}",
        "--piece_mb=0.008",
        "--filters=engine_tasks:slowly",
    ]
    out = tmp_path / "out"
    log = tmp_path / "log"
    running = start(command(out, *given), log)
    until(running, lambda: len(done(out)) >= 3, log)
    send(running.pid)

    assert running.wait(SECONDS) == 10
    assert (
        "Traceback" not in log.read_text()
        and "interrupted; what is finished stays" in log.read_text()
    )
    assert documents(prepare(out, *given))["text"]["train"] == texts(4000)


@pytest.fixture(scope="module")
def ray():
    """A real Ray: the first command starts it, and the last test ends it."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    yield ray
    ray.shutdown()


def test_ray_gives_what_processes_give(tmp_path, ray):
    for name in "ab":
        write_jsonl(tmp_path / f"in/{name}.jsonl", texts(50, ord(name)))
    given = [
        f"--input={tmp_path / 'in'}",
        "--eval_fraction=0.2",
        "--dedup=exact",
        "--tokenizer=bpe:300",
        "--piece_mb=0.004",
    ]
    wanted = contents(prepare(tmp_path / "local", *given))
    assert contents(prepare(tmp_path / "ray", *given, "--engine=ray", workers=2)) == wanted

    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    refused(
        2,
        ("bad.jsonl:2", "JSON"),
        f"--input={tmp_path / 'bad.jsonl'}",
        f"--output={tmp_path / 'out'}",
        "--engine=ray",
    )
    # Ray's workers cannot import the tests.
    with pytest.raises(PeerFailed, match="a Ray worker failed at item 0: ModuleNotFoundError"):
        list(ENGINES["ray"](work(die, [0])))

    ray.cloudpickle.register_pickle_by_value(engine_tasks)
    seen = []
    got = {}
    for number, result in ENGINES["ray"](work(square, [3, 4, 5], 2, lambda *how: seen.append(how))):
        got[number] = result
        assert len(seen) == len(got)  # progress is told as each ends
    assert got == {0: 9, 1: 16, 2: 25} and sorted(seen) == [(1, 3), (1, 4), (1, 5)]
    with pytest.raises(PeerFailed, match="a Ray worker failed at item 2"):
        list(ENGINES["ray"](work(die, [0, 1, 2, 3])))


def test_ray_where_there_is_none(tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    refused(
        2,
        ("--ray_address=127.0.0.1:1", "no cluster"),
        f"--input={tmp_path / 'a.jsonl'}",
        f"--output={tmp_path / 'out'}",
        "--engine=ray",
        "--ray_address=127.0.0.1:1",
    )
