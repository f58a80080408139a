"""The meeting of a job beside strangers who reach its port: slow ones, silent ones and liars."""

import contextlib
import json
import socket
import threading
import time

import pytest

from gpt_jax.cluster import messages, rendezvous
from gpt_jax.cluster.launch_local import find_free_port
from gpt_jax.errors import PeerFailed, UsageError

HELLO = {"process": 1, "processes": 2, "host": "h", "pid": 1}


def attend(port: int, process: int, seconds: float = 20.0, secret: str = "", ends=None):
    """A thread that meets as `process` of two. Its end is in `ends`: None, or what was raised."""
    place = rendezvous.Place(f"127.0.0.1:{port}", 2, process, secret)

    def go():
        try:
            rendezvous.meet(place, seconds)
            ends[process] = None
        except Exception as error:
            ends[process] = error

    thread = threading.Thread(target=go)
    thread.start()
    return thread


def connect(port: int) -> socket.socket:
    """A connection to process 0, as soon as it listens."""
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 5)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def say(port: int, message: dict) -> dict | None:
    """What process 0 answers to a message."""
    with connect(port) as line:
        line.sendall(json.dumps(message).encode() + b"\n")
        return json.loads(line.recv(messages.LINE_BYTES) or b"null")


def test_a_stranger_who_speaks_slowly_does_not_hold_process_0():
    """It sends a byte at a time, so that each byte comes in time and the line never ends."""
    ends = {}
    job = attend(port := find_free_port(), 0, seconds=1.5, ends=ends)
    began = time.monotonic()
    with connect(port) as line, contextlib.suppress(OSError):
        while job.is_alive() and time.monotonic() - began < 10:
            line.sendall(b"x")
            time.sleep(0.1)
    job.join()
    assert time.monotonic() - began < 5
    assert isinstance(ends[0], PeerFailed) and "missing: process 1" in str(ends[0])


def test_a_connection_has_one_limit_for_its_whole_line(monkeypatch):
    monkeypatch.setattr(messages, "LINE_SECONDS", 0.5)
    ours, theirs = socket.socketpair()
    is_over = threading.Event()

    def drip():
        for _ in range(50):
            theirs.sendall(b"x")
            if is_over.wait(0.1):
                break
        theirs.close()

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        messages.read_line(ours)
    assert time.monotonic() - began < 2
    is_over.set()
    thread.join()


def test_silent_strangers_do_not_hold_up_a_job():
    """Each connection is read beside the others, and not after them."""
    ends = {}
    port = find_free_port()
    jobs = [attend(port, 0, ends=ends)]
    with contextlib.ExitStack() as strangers:
        for _ in range(40):
            strangers.enter_context(connect(port))
        jobs.append(attend(port, 1, ends=ends))
        for job in jobs:
            job.join(10)
        assert ends == {0: None, 1: None}


def test_more_strangers_than_can_be_open_push_each_other_out(monkeypatch):
    monkeypatch.setattr(messages, "MOST_CALLERS", 5)
    ends = {}
    port = find_free_port()
    jobs = [attend(port, 0, ends=ends)]
    with contextlib.ExitStack() as strangers:
        for _ in range(20):
            strangers.enter_context(connect(port))
        jobs.append(attend(port, 1, ends=ends))
        for job in jobs:
            job.join(10)
        assert ends == {0: None, 1: None}


FAILED = {"code": 2, "text": "line1\nTraceback fake\x1b[2J"}


@pytest.mark.parametrize(
    "forged",
    [
        HELLO | {"failed": FAILED},  # no seal
        messages.seal(HELLO | {"failed": FAILED}, "guess"),
        messages.seal(HELLO, "secret") | {"failed": FAILED},  # the seal of something else
        HELLO | {"failed": FAILED, "seal": 7},
    ],
)
def test_who_does_not_know_the_secret_ends_no_job(forged):
    ends = {}
    port = find_free_port()
    jobs = [attend(port, 0, secret="secret", ends=ends)]
    assert say(port, forged) == {"say": "refused"}
    jobs.append(attend(port, 1, secret="secret", ends=ends))
    for job in jobs:
        job.join(20)
    assert ends == {0: None, 1: None}


@pytest.mark.parametrize(
    "wrong",
    [
        {"failed": {"code": 0, "text": "fine"}},
        {"failed": {"code": 77, "text": "no code of ours"}},
        {"failed": {"code": True, "text": "no number"}},
        {"host": ""},
        {"host": "x" * 300},
        {"pid": 0},
    ],
)
def test_what_no_process_says_is_no_hello(wrong):
    assert messages.is_hello(HELLO) and not messages.is_hello(HELLO | wrong)


def test_nested_json_is_no_message():
    assert messages.parse(b"[" * 8000 + b"\n", messages.is_hello) is None


def test_what_others_say_is_printed_as_one_plain_line():
    """Without a secret anybody may say that a process has failed, but not as a forged log."""
    ends = {}
    job = attend(port := find_free_port(), 0, ends=ends)
    answer = say(port, messages.seal(HELLO | {"host": "\x1b[31mevil", "failed": FAILED}, ""))
    job.join(20)
    wanted = "process 1 on \\x1b[31mevil failed: line1 Traceback fake\\x1b[2J"
    assert isinstance(ends[0], UsageError) and str(ends[0]) == wanted
    assert (answer["say"], answer["code"], answer["text"]) == ("end", 2, wanted)


def test_a_process_of_another_job_is_told_why_it_waits():
    ends = {}
    port = find_free_port()
    jobs = [attend(port, k, seconds=2, secret=f"job {k}", ends=ends) for k in range(2)]
    for job in jobs:
        job.join(20)
    for error in ends.values():
        assert isinstance(error, PeerFailed) and "GPT_JAX_JOB differs" in str(error)
    assert "process 1 on " in str(ends[0])


# ---- a process that is started twice ----


def make_meeting(processes: int = 3) -> rendezvous.Meeting:
    place = rendezvous.Place("h:1", processes, 0)
    return rendezvous.Meeting(place, HELLO | {"process": 0, "processes": processes})


def hello(process: int, pid: int, **more) -> dict:
    return messages.seal(HELLO | {"process": process, "processes": 3, "pid": pid, **more}, "")


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("failed", [{}, {"failed": {"code": 2, "text": "a typo"}}])
def test_the_second_one_is_refused_and_the_job_goes_on(is_complete, failed):
    meeting = make_meeting()
    assert meeting.answer(hello(1, 10), 0.0)["say"] == "wait"
    if is_complete:
        assert meeting.answer(hello(2, 20), 0.1)["say"] == "go"
        meeting.told.add(2)

    answer = meeting.answer(hello(1, 11, **failed), 0.2)
    assert (answer["say"], answer["code"]) == ("end", 2)
    assert answer["text"].startswith("--process_id=1: two processes say so")
    meeting.answer(hello(2, 20), 0.3)
    assert meeting.answer(hello(1, 10), 0.4)["say"] == "go"
    meeting.told |= {1, 2}
    assert meeting.is_over()
    meeting.conclude(5)
    # Who has been told to go has no reason to ask any more.
    assert meeting.answer(hello(1, 11), 99.0)["say"] == "end"


def test_the_heir_of_a_process_that_has_gone_is_no_second_one():
    meeting = make_meeting()
    meeting.answer(hello(1, 10), 0.0)
    assert meeting.answer(hello(1, 11), rendezvous.GONE_SECONDS + 0.1)["say"] == "wait"
    assert meeting.answer(hello(2, 20), rendezvous.GONE_SECONDS + 0.2)["say"] == "go"


class Silent:
    """A port where somebody takes every line and answers no question, as JAX does."""

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.is_over = threading.Event()
        self.server.settimeout(0.1)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def serve(self):
        while not self.is_over.is_set():
            with contextlib.suppress(OSError):
                line, _ = self.server.accept()
                with line:
                    line.recv(1000)
                    line.sendall(b"\x00\x00\x18\x04\n")

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()
        self.server.close()


def test_who_comes_after_the_job_has_begun_does_not_join_it(monkeypatch):
    """It would take the place of the process in the job, and so end that job."""
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "ASK_SECONDS", 0.05)
    with Silent() as there:
        place = rendezvous.Place(f"127.0.0.1:{there.port}", 2, 1)
        with pytest.raises(
            PeerFailed, match="a job has begun there without this process, perhaps "
        ):
            rendezvous.meet(place, 1.5)


def test_who_was_at_the_meeting_goes_on_if_its_go_is_lost(monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "ASK_SECONDS", 0.05)
    answers = iter([messages.seal({"say": "wait", "text": "1 of 2"}, "")])
    monkeypatch.setattr(rendezvous, "parse", lambda *_: next(answers, None))
    with Silent() as there:
        began = time.monotonic()
        rendezvous.meet(rendezvous.Place(f"127.0.0.1:{there.port}", 2, 1), 20)
        assert time.monotonic() - began < 5
