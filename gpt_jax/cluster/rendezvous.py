"""How the processes of a job find each other before JAX takes over the same port.

JAX's own start waits in native code, and ends the process with abort(). It cannot say who is
missing, nor hear that somebody has failed on the way. So every process first says hello to
process 0, which answers "wait", "go" or "end" with a reason.

Every question is a short connection with a line of JSON each way. Thousands of processes then need
no open sockets. Lines carry the seal of the job's secret, see messages.py.
"""

import os
import socket
import time
from collections.abc import Collection
from typing import Any, NamedTuple

from gpt_jax.cluster.messages import (
    LINE_SECONDS,
    MOST_HOST,
    Callers,
    is_answer,
    is_hello,
    is_sealed,
    parse,
    read_line,
    seal,
    shorten,
    write_line,
)
from gpt_jax.errors import Exit, PeerFailed, UsageError, exit_of, plain

# The environment variable that holds the secret of a job. Launchers make one for each job.
SECRET = "GPT_JAX_JOB"
ASK_SECONDS = 0.5  # between two questions of a waiting process
LINGER_SECONDS = 10.0  # process 0 goes on answering so long once it knows how the meeting ends
# A process that has not asked for so long may be replaced by another one with its number.
GONE_SECONDS = 4.0
MOST_NAMED = 8  # processes in one line


class Place(NamedTuple):
    """This process's place in a job of several. `address` is HOST:PORT of process 0."""

    address: str
    processes: int
    process: int
    secret: str = ""


def split_address(address: str) -> tuple[str, int]:
    """ "host:1234" -> ("host", 1234), "[::1]:1234" -> ("::1", 1234). Raises UsageError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--coordinator={address}: expected HOST:PORT of process 0, as in node1:12345"
        )
    return host.strip("[]"), int(port)


def meet(place: Place, seconds: float, failed: Exit | None = None) -> None:
    """Returns once all processes of the job have come.

    `failed` says why this process cannot start, which ends the job for all. The others are then
    told if they come within LINGER_SECONDS, and nothing is raised.

    Raises PeerFailed if the others or process 0 do not come within `seconds`, and UsageError if
    they do not fit together. What another process failed of is raised with its code and text.
    """
    if place.processes == 1:
        return
    host, port = split_address(place.address)
    hello: dict[str, Any] = {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname()[:MOST_HOST],
        "pid": os.getpid(),
    }
    if failed:
        hello["failed"] = {"code": failed.code, "text": shorten(str(failed))}
        seconds = min(seconds, LINGER_SECONDS)
    try:
        if place.process == 0:
            receive(place, port, hello, seconds)
        else:
            ask(place, host, port, hello, seconds)
    except Exit:
        if not failed:
            raise


def ask(place: Place, host: str, port: int, hello: dict, seconds: float) -> None:
    """The part of every process but 0: asks until process 0 says go or end."""
    end = time.monotonic() + seconds
    missing = ""  # what process 0 said last, while it waits for others
    problem = "no answer"
    silent_since = None  # since when somebody there has not answered

    while time.monotonic() < end:
        now = time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=min(LINE_SECONDS, seconds)) as line:
                write_line(line, seal(hello, place.secret))
                answer = parse(read_line(line), is_answer) or {}
        except OSError as error:
            problem = str(error)
        else:
            is_genuine = bool(answer) and is_sealed(answer, place.secret)
            say = answer.get("say") if is_genuine else None
            if say == "end":
                raise exit_of(answer["code"], plain(answer["text"]))
            if say == "go":
                return
            if say == "wait":
                missing = plain(answer["text"])
                silent_since = None
            else:
                problem = describe_stranger(answer, place)
                silent_since = silent_since or now
                # JAX has the port now. It is that of this job, whose "go" was lost, because this
                # process has spoken with process 0 before. A process that never has must not go
                # on: it would take the place of one that is in the job.
                if missing and now - silent_since > LINGER_SECONDS:
                    return
        time.sleep(ASK_SECONDS)

    limit = f"within --join_seconds={seconds:g}"
    if not missing:
        raise PeerFailed(
            f"--coordinator={place.address}: process {place.process} on {hello['host']} did not "
            f"reach process 0 there {limit} ({problem}); it has not started, its log may have the "
            "reason, or the address is wrong"
        )
    raise PeerFailed(f"{missing}, {limit}; the logs of those missing may have the reason")


def describe_stranger(answer: dict, place: Place) -> str:
    """Why what somebody at process 0's address said is no answer to this process."""
    if answer:
        return f"what listens there belongs to another job: {SECRET} differs"
    return (
        f"what listens there is no meeting: a job has begun there without this process, perhaps "
        f"with another process {place.process}, or another program has the port"
    )


def receive(place: Place, port: int, hello: dict, seconds: float) -> None:
    """The part of process 0: answers until all others have been told the same."""
    meeting = Meeting(place, hello)
    end = time.monotonic() + seconds
    with listen(place.address, port) as server, Callers(server) as callers:
        while not meeting.is_over() and time.monotonic() < end:
            for caller, text in callers.listen(end - time.monotonic()):
                was_open = meeting.verdict is None
                # A line that is no hello is that of a stranger, a port scanner say.
                other = parse(text, is_hello)
                if other is None:
                    continue
                answer = meeting.answer(other, time.monotonic())
                if callers.reply(caller, answer) and answer == meeting.sealed_verdict:
                    meeting.told.add(other["process"])
                if was_open and meeting.verdict is not None:
                    end = time.monotonic() + LINGER_SECONDS
    meeting.conclude(seconds)


class Meeting:
    """What process 0 knows of the others, and what it answers them.

    `verdict` is how the meeting ends, once that is known.
    """

    def __init__(self, place: Place, hello: dict):
        self.place = place
        self.came = {0: hello}
        self.heard: dict[int, float] = {}  # process -> when it last asked
        self.told: set[int] = set()  # processes that know the verdict
        self.refused: dict[str, str] = {}  # who -> why
        self.doubled = False  # whether two processes said that they are the same
        self.verdict: dict[str, Any] | None = None
        if "failed" in hello:
            failed = hello["failed"]
            text = f"process 0 on {hello['host']} failed: {failed['text']}"
            self.verdict = make_end(failed["code"], text)

    @property
    def sealed_verdict(self) -> dict[str, Any] | None:
        return None if self.verdict is None else seal(self.verdict, self.place.secret)

    def is_over(self) -> bool:
        """Whether every other process knows how it ends."""
        return len(self.told) == self.place.processes - 1

    def answer(self, other: dict, now: float) -> dict[str, Any]:
        """What a process is told that has said hello. A newcomer may be refused by itself."""
        who = f"process {other['process']} on {plain(other['host'])}"
        if not is_sealed(other, self.place.secret):
            self._note_refusal(who, f"its {SECRET} differs")
            return {"say": "refused"}

        before = self.came.get(other["process"])
        if before is not None and name_process(before) != name_process(other):
            is_there = now - self.heard[other["process"]] < GONE_SECONDS
            if is_there or other["process"] in self.told:
                return seal(self._refuse_double(before, other), self.place.secret)
            self.came[other["process"]] = (
                other  # The one before has gone, and this one is its heir.
            )

        self.heard[other["process"]] = now
        if self.verdict is None:
            self.verdict = judge(self.came, other, self.place.processes)
        if self.verdict is None:
            text = describe_missing(self.came, self.place)
            return seal({"say": "wait", "text": text}, self.place.secret)
        return seal(self.verdict, self.place.secret)

    def _refuse_double(self, before: dict, other: dict) -> dict[str, Any]:
        process = other["process"]
        host = plain(other["host"])
        self.doubled = True
        self._note_refusal(f"process {process} on {host}", "another one has come before")
        return make_end(
            UsageError.code,
            f"--process_id={process}: two processes say so, one on {plain(before['host'])} that "
            f"came first and one on {host} that is refused; give each its own",
        )

    def _note_refusal(self, who: str, why: str) -> None:
        if len(self.refused) < MOST_NAMED:
            self.refused[who] = why

    def conclude(self, seconds: float) -> None:
        """Returns if the job may begin. Raises what the meeting has ended with."""
        refused = "".join(f"; {who} was refused: {why}" for who, why in self.refused.items())
        if self.verdict is None:
            # A number that two processes have is one that another process lacks.
            kind = UsageError if self.doubled else PeerFailed
            raise kind(
                f"{describe_missing(self.came, self.place)}, within --join_seconds={seconds:g}"
                f"{shorten(refused)}; the logs of those missing may have the reason"
            )
        if self.verdict["say"] == "end":
            raise exit_of(self.verdict["code"], plain(self.verdict["text"]))
        gone = set(range(1, self.place.processes)) - self.told
        if gone:
            raise PeerFailed(
                f"{list_processes(gone)} came and went again before the job began; "
                "the log there has the reason"
            )


def name_process(hello: dict) -> tuple[str, int]:
    """What tells two processes apart."""
    return hello["host"], hello["pid"]


def judge(came: dict[int, dict], other: dict, processes: int) -> dict[str, Any] | None:
    """Notes in `came` who came. Returns how the meeting ends, once that is known."""
    who = f"process {other['process']} on {other['host']}"
    if "failed" in other:
        return make_end(other["failed"]["code"], f"{who} failed: {other['failed']['text']}")
    if other["processes"] != processes:
        return make_end(
            UsageError.code,
            f"--num_processes: {who} says {other['processes']}, process 0 says {processes}; "
            "start all with the same number",
        )
    came.setdefault(other["process"], other)
    return {"say": "go"} if len(came) == processes else None


def make_end(code: int, text: str) -> dict[str, Any]:
    """The answer that ends the job for all."""
    return {"say": "end", "code": code, "text": plain(text)}


def describe_missing(came: dict, place: Place) -> str:
    """ "2 of 4 processes came to HOST:PORT, missing: processes 1 and 3"."""
    absent = [process for process in range(place.processes) if process not in came]
    return (
        f"{len(came)} of {place.processes} processes came to {place.address}, "
        f"missing: {list_processes(absent)}"
    )


def list_processes(processes: Collection[int]) -> str:
    """ "process 3", or "processes 1, 3 and 5", shortened where there are many."""
    words = [str(process) for process in sorted(processes)]
    if len(words) == 1:
        return f"process {words[0]}"
    if len(words) > MOST_NAMED:
        rest = len(words) - MOST_NAMED + 1
        words = [*words[: MOST_NAMED - 1], f"{rest} more"]
    return f"processes {', '.join(words[:-1])} and {words[-1]}"


def listen(address: str, port: int) -> socket.socket:
    """A server on all of this machine's addresses. Raises UsageError when the port is taken."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=both,
        )
    except OSError as error:
        # The error's own text names an address; that of its number is short.
        reason = os.strerror(error.errno or 0)
        raise UsageError(
            f"--coordinator={address}: process 0 cannot listen on port {port}: {reason}; "
            "is another process 0 there? else choose another port"
        ) from None
