"""One process of a job fails: the others are gone at once, say why, and leave with a code that a scheduler can use."""

import os
import signal
import socket

import pytest
import runs

from gpt_jax import meeting
from gpt_jax.errors import PeerFailed, UsageError

HOST = socket.gethostname()
LONG = ("--config.train.steps=100000", "--config.eval.every_steps=0", "--config.checkpoint.every_steps=0")


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def said(process) -> list[str]:
    """The program's own lines on standard error."""
    return [line for line in process.err.splitlines() if line.startswith("gpt-jax: ")]


CRASH = """
import sys
from gpt_jax import loop
from gpt_jax.commands import main
from gpt_jax.errors import SaveFailed
plain = loop.one_step
def one_step(run, state, step, columns, profile):
    if step == 8:
        raise {error}
    return plain(run, state, step, columns, profile)
loop.one_step = one_step
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("error, victim, codes", [
    ("ZeroDivisionError('by nothing')", 1, (1, 1)), ("SaveFailed('the disk is full')", 0, (50, 40))])
def test_a_failure_in_one_process_is_the_others_reason(tmp_path, error, victim, codes):
    """The others leave with 40 where a restart may help, else with the same code. In the middle of a collective."""
    given = runs.arguments(tmp_path, tmp_path / "job", *LONG)
    python = [("-m", "gpt_jax")] * 2
    python[victim] = "-c", CRASH.format(error=error)
    job = runs.job(tmp_path / "logs", 2, given, python=python)
    for process, code in ((job[victim], codes[0]), (job[1 - victim], codes[1])):
        process.end(code, 100)
    (last,) = said(job[1 - victim])
    text = error.split("'")[1]
    assert last.startswith(f"gpt-jax: a peer process failed: process {victim} on {HOST}, exit code {codes[0]}: ") and text in last
    assert ("Traceback" in job[victim].err) == (codes[0] == 1) and text in job[victim].err


@pytest.mark.parametrize("victim", [0, 1])
def test_what_is_wrong_before_joining_ends_all(tmp_path, victim):
    own = [["--config.train.batch_size=0"] * (k == victim) for k in range(2)]
    job = runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job"), own=own)
    for process in job:
        process.end(2, 100)
    assert said(job[victim])[-1].startswith("gpt-jax: config.train.batch_size = 0")
    assert said(job[1 - victim])[-1].startswith(f"gpt-jax: process {victim} on {HOST} failed: config.train.batch_size = 0")


def test_a_process_that_stands_still_is_missed(tmp_path):
    """One that stands still altogether, so that no connection closes: only its heartbeats are missing."""
    job = runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job", *LONG))
    job[0].until(runs.logged(tmp_path / "job", 10), "step 10")
    job[1].signal(signal.SIGSTOP)  # no word, no closed connection: only silence
    job[0].end(40, 100)
    assert "a peer process is gone without a word" in said(job[0])[-1] and "Traceback" not in job[0].err


# ---- the meeting ----

def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def attend(port: int, places, seconds: float = 20.0, failed=None) -> list:
    """What `meet` raises for each (process, processes), in threads."""
    import threading

    found = [None] * len(places)

    def go(i, process, processes):
        try:
            meeting.meet(meeting.Place(f"127.0.0.1:{port}", processes, process), seconds, (failed or {}).get(process))
            found[i] = "came"
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=go, args=(i, *place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_come():
    assert attend(free_port(), [(k, 5) for k in (3, 1, 0, 4, 2)]) == ["came"] * 5


def test_a_worker_that_never_comes_is_named():
    found = attend(port := free_port(), [(k, 4) for k in (0, 2)], seconds=2)
    for error in found:
        assert isinstance(error, PeerFailed)
        assert str(error).startswith(f"2 of 4 processes came to 127.0.0.1:{port}, missing: processes 1 and 3, within "
                                     "--join_seconds=2")


def test_a_coordinator_that_cannot_be_reached_is_named():
    (error,) = attend(port := free_port(), [(1, 2)], seconds=1.5)
    assert isinstance(error, PeerFailed) and f"--coordinator=127.0.0.1:{port}: process 1" in str(error)
    assert "--join_seconds=1.5" in str(error) and "refused" in str(error)


@pytest.mark.parametrize("places, words", [([(0, 2), (1, 3)], "--num_processes: process 1"),
                                           ([(0, 3), (1, 3), (1, 3)], "--process_id=1: two processes say so")])
def test_processes_that_do_not_fit_together(monkeypatch, places, words):
    pids = iter(range(100, 200))
    monkeypatch.setattr(os, "getpid", lambda: next(pids))  # each thread stands for a process: `meet` asks once
    monkeypatch.setattr(meeting, "LINGER_SECONDS", 2.0)
    for error in attend(free_port(), places):
        assert isinstance(error, UsageError) and str(error).startswith(words)


def test_one_that_failed_tells_all(monkeypatch):
    monkeypatch.setattr(meeting, "LINGER_SECONDS", 2.0)
    for who in (0, 2):
        found = attend(free_port(), [(k, 3) for k in range(3)], failed={who: UsageError("no such file: " + "x" * 9999)})
        assert found.pop(who) == "came"
        assert all(isinstance(error, UsageError) and str(error).startswith(f"process {who} on {HOST} failed: no such file")
                   for error in found)


def test_strangers_are_no_process():
    """A port scanner, and something that says nothing, while the processes come."""
    import threading

    port = free_port()
    job = threading.Thread(target=attend, args=(port, [(0, 2)], 10.0))
    job.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b"{}\n"):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as line:
                    line.sendall(text)
                break
            except ConnectionRefusedError:
                continue
    assert attend(port, [(1, 2)]) == ["came"]
    job.join(20)


@pytest.mark.parametrize("address", ["host", "host:", "host:http", ":5", "host:99999", "host:0"])
def test_an_address_without_a_port_is_refused(tmp_path, address):
    code, text = runs.refusal(*runs.arguments(tmp_path, tmp_path / "job"), f"--coordinator={address}", "--num_processes=2")
    assert code == 2 and text.startswith(f"--coordinator={address}: expected HOST:PORT")
