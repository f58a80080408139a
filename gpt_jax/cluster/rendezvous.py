"""How the processes of a job find each other before JAX takes over the same port.

JAX's own start waits in native code, and ends the process with abort(). It cannot say who is
missing, nor hear that somebody has failed on the way. So every process first says hello to
process 0, which answers "wait", "go" or "end" with a reason.

Every question is a short connection with a line of JSON each way. Thousands of processes then need
no open sockets.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from gpt_jax.errors import Exit, PeerFailed, UsageError, exit_of

ASK_SECONDS = 0.5  # between two questions of a waiting process
LINGER_SECONDS = 10.0  # process 0 goes on answering so long once it knows how the meeting ends
LINE_SECONDS = 5.0  # for one line to arrive
LINE_BYTES = 8192
MOST_NAMED = 8  # processes in one line


class Place(NamedTuple):
    """This process's place in a job of several. `address` is HOST:PORT of process 0."""

    address: str
    processes: int
    process: int


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
    if place.processes == 1:  # a job of one, as SLURM starts it for one task
        return
    host, port = split_address(place.address)
    hello: dict[str, Any] = {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
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
    answer: dict[str, Any] = {}
    problem = "no answer"
    silent_since = None  # when somebody who is no process 0 of a job took the line first

    while time.monotonic() < end:
        now = time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=min(LINE_SECONDS, seconds)) as line:
                write_line(line, hello)
                answer = read_line(line, is_answer) or {}
        except OSError as error:
            problem = str(error)
        else:
            if answer.get("say") == "end":
                raise exit_of(answer["code"], answer["text"])
            if answer.get("say") == "go":
                return
            # Without an answer JAX has the port. It is that of this job, whose "go" was lost, or
            # that of the job before, which will soon be gone.
            if not answer:
                silent_since = silent_since or now
                if now - silent_since > LINGER_SECONDS:
                    return
        time.sleep(ASK_SECONDS)

    limit = f"within --join_seconds={seconds:g}"
    if not answer:
        raise PeerFailed(
            f"--coordinator={place.address}: process {place.process} on {hello['host']} did not "
            f"reach process 0 there {limit} ({problem}); it has not started, its log may have the "
            "reason, or the address is wrong"
        )
    raise PeerFailed(f"{answer['text']}, {limit}; the logs of those missing may have the reason")


def receive(place: Place, port: int, hello: dict, seconds: float) -> None:
    """The part of process 0: answers until all others have been told the same."""
    came = {0: hello}
    told: set[int] = set()
    verdict = None
    if "failed" in hello:
        failed = hello["failed"]
        verdict = make_end(failed["code"], f"process 0 on {hello['host']} failed: {failed['text']}")

    end = time.monotonic() + seconds
    with listen(place.address, port) as server:
        while len(told) < place.processes - 1 and time.monotonic() < end:
            server.settimeout(max(0.001, end - time.monotonic()))
            try:
                line, _ = server.accept()
                with line:
                    line.settimeout(LINE_SECONDS)
                    other = read_line(line, is_hello)
                    if other is None:  # a stranger, a port scanner say
                        continue
                    if verdict is None:
                        verdict = judge(came, other, place.processes)
                        if verdict is not None:
                            end = time.monotonic() + LINGER_SECONDS
                    if verdict is None:
                        write_line(line, {"say": "wait", "text": describe_missing(came, place)})
                    else:
                        write_line(line, verdict)
                        told.add(other["process"])
            except OSError:  # this one comes again, or counts as missing
                continue

    if verdict is None:
        raise PeerFailed(
            f"{describe_missing(came, place)}, within --join_seconds={seconds:g}; "
            "the logs of those missing may have the reason"
        )
    if verdict["say"] == "end":
        raise exit_of(verdict["code"], verdict["text"])
    gone = set(range(1, place.processes)) - told
    if gone:
        raise PeerFailed(
            f"{list_processes(gone)} came and went again before the job began; "
            "the log there has the reason"
        )


def judge(came: dict[int, dict], other: dict, processes: int) -> dict[str, Any] | None:
    """Notes in `came` who came. Returns how the meeting ends, once that is known."""
    process = other["process"]
    who = f"process {process} on {other['host']}"
    if "failed" in other:
        return make_end(other["failed"]["code"], f"{who} failed: {other['failed']['text']}")
    if other["processes"] != processes:
        return make_end(
            UsageError.code,
            f"--num_processes: {who} says {other['processes']}, process 0 says {processes}; "
            "start all with the same number",
        )

    before = came.setdefault(process, other)
    if (before["host"], before["pid"]) != (other["host"], other["pid"]):
        return make_end(
            UsageError.code,
            f"--process_id={process}: two processes say so, one on {before['host']} and one on "
            f"{other['host']}; give each its own",
        )
    return {"say": "go"} if len(came) == processes else None


def make_end(code: int, text: str) -> dict[str, Any]:
    """The answer that ends the job for all."""
    return {"say": "end", "code": code, "text": text}


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


def shorten(text: str) -> str:
    """A text that fits into a line whatever is in it."""
    most = LINE_BYTES // 16  # JSON takes up to 12 bytes for a character
    return text if len(text) <= most else text[:most] + " …"


def write_line(line: socket.socket, message: dict) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def has(message: object, **kinds: type) -> bool:
    """Whether this is a dict with these keys, of just these types."""
    if not isinstance(message, dict):
        return False
    return all(type(message.get(key)) is kind for key, kind in kinds.items())


def is_hello(message: object) -> bool:
    """Whether a process of a job says so, one that is not process 0."""
    if not isinstance(message, dict) or not has(
        message, process=int, processes=int, host=str, pid=int
    ):
        return False
    if "failed" in message and not has(message["failed"], code=int, text=str):
        return False
    return 0 < message["process"] < message["processes"]


def is_answer(message: object) -> bool:
    """Whether process 0 of a job says so."""
    if not isinstance(message, dict):
        return False
    needed = {"go": {}, "wait": dict(text=str), "end": dict(text=str, code=int)}
    say = message.get("say")
    return isinstance(say, str) and say in needed and has(message, **needed[say])


def read_line(line: socket.socket, is_wanted: Callable[[object], bool]) -> dict | None:
    """The other side's message; None if it is not wanted. Raises OSError when nothing comes."""
    received = b""
    while not received.endswith(b"\n") and len(received) < LINE_BYTES:
        part = line.recv(LINE_BYTES)
        if not part:
            break
        received += part
    if not received:
        raise ConnectionError("closed without an answer")

    try:
        message = json.loads(received)
    except ValueError:
        return None
    return message if is_wanted(message) else None
