"""Processes of a job meet.

Who is missing, doubled or strange is named. An end reaches all.
"""

import json
import os
import socket

import pytest
import runs
from runs import HOST

from gpt_jax.cluster import messages, rendezvous
from gpt_jax.cluster.launch_local import find_free_port
from gpt_jax.errors import EXIT_CODES, EXIT_KINDS, PeerFailed, UsageError, exit_of


def attend(port: int, places, seconds: float = 20.0, failed=None) -> list:
    """What `meet` raises for each (process, processes), which run as threads."""
    import threading

    found = [None] * len(places)

    def go(i, process, processes):
        try:
            rendezvous.meet(
                rendezvous.Place(f"127.0.0.1:{port}", processes, process),
                seconds,
                (failed or {}).get(process),
            )
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
    assert attend(find_free_port(), [(k, 5) for k in (3, 1, 0, 4, 2)]) == ["came"] * 5


def test_a_job_of_one_has_met():
    assert attend(find_free_port(), [(0, 1)], seconds=1) == ["came"]


def test_long_texts_fit_into_a_line():
    text = json.dumps(messages.shorten("🎉" * 9999))
    assert 1000 < len(text) < messages.LINE_BYTES - 1000  # with room for the other fields


def test_a_worker_that_never_comes_is_named():
    found = attend(port := find_free_port(), [(k, 4) for k in (0, 2)], seconds=2)
    for error in found:
        assert isinstance(error, PeerFailed)
        assert str(error).startswith(
            f"2 of 4 processes came to 127.0.0.1:{port}, missing: processes 1 and 3, within "
            "--join_seconds=2"
        )


def test_a_coordinator_that_cannot_be_reached_is_named():
    (error,) = attend(port := find_free_port(), [(1, 2)], seconds=1.5)
    assert isinstance(error, PeerFailed) and f"--coordinator=127.0.0.1:{port}: process 1" in str(
        error
    )
    assert "--join_seconds=1.5" in str(error) and "refused" in str(error)


def test_processes_that_do_not_fit_together(monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 2.0)
    for error in attend(find_free_port(), [(0, 2), (1, 3)]):
        assert isinstance(error, UsageError)
        assert str(error).startswith("--num_processes: process 1")


def test_a_process_that_came_twice_is_why_another_is_missing(monkeypatch):
    pids = iter(range(100, 200))
    # Each thread stands for a process: `meet` asks once.
    monkeypatch.setattr(os, "getpid", lambda: next(pids))
    found = attend(find_free_port(), [(0, 3), (1, 3), (1, 3)], seconds=3)
    refused = [error for error in found if str(error).startswith("--process_id=1: two processes")]
    assert len(refused) == 1 and isinstance(refused[0], UsageError)
    assert isinstance(found[0], UsageError) and "missing: process 2" in str(found[0])
    assert f"process 1 on {HOST} was refused: another one has come before" in str(found[0])


def test_one_that_failed_tells_all(monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 2.0)

    for who in (0, 2):
        found = attend(
            find_free_port(),
            [(k, 3) for k in range(3)],
            failed={who: UsageError("no such file: " + "x" * 9999)},
        )
        assert found.pop(who) == "came"
        assert all(
            isinstance(error, UsageError)
            and str(error).startswith(f"process {who} on {HOST} failed: no such file")
            for error in found
        )


def test_strangers_are_no_process():
    """A port scanner, and something that says nothing, connect while the processes come."""
    import threading

    port = find_free_port()
    job = threading.Thread(target=attend, args=(port, [(0, 2)], 10.0))
    job.start()
    hello = {"process": 1, "processes": 2, "host": "h", "pid": 1}
    near = [{key: value for key, value in hello.items() if key != left_out} for left_out in hello]
    near += [
        hello | {"process": "1"},
        hello | {"process": 0},
        hello | {"process": 2},
        hello | {"processes": [2]},
        hello | {"failed": 3},
        hello | {"failed": {"code": 2}},
    ]
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"[1]\n",
        b"{}\n",
        *(json.dumps(messages.seal(word, "")).encode() + b"\n" for word in near),
    ):
        while job.is_alive():
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as line:
                    line.sendall(text)
                break
            except ConnectionRefusedError:
                continue
    assert job.is_alive()
    assert attend(port, [(1, 2)]) == ["came"]
    job.join(20)


@pytest.mark.parametrize(
    "said",
    [{"say": "end"}, {"say": "end", "text": "x", "code": "2"}, {"say": ["go"]}, {"text": "hi"}, []],
)
def test_what_is_no_answer_of_process_0_is_none(said):
    assert not messages.is_answer(said)


def test_an_end_is_made_again_of_its_code():
    assert set(EXIT_KINDS) == set(EXIT_CODES) - {0}
    for code in (*EXIT_CODES, 1):
        assert (
            type(exit_of(code, "why")) is EXIT_KINDS.get(code, PeerFailed)
            and str(exit_of(code, "why")) == "why"
        )


@pytest.mark.parametrize("address", ["host", "host:", "host:http", ":5", "host:99999", "host:0"])
def test_an_address_without_a_port_is_refused(tmp_path, address):
    code, text = runs.refusal(
        *runs.arguments(tmp_path, tmp_path / "job"), f"--coordinator={address}", "--num_processes=2"
    )
    assert code == 2 and text.startswith(f"--coordinator={address}: expected HOST:PORT")
