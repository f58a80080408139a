"""How the processes of a job find each other before JAX takes over the same port (floor 0; called
by commands).

JAX's own start waits in native code and ends it with abort(): it cannot say who is missing, nor
hear that somebody has failed on the way. So every process first says hello to process 0, which
answers "wait", "go" or "end" with a reason. One short connection a question: thousands of processes
need no open sockets. A line of JSON each way.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from gpt_jax.errors import Exit, PeerFailed, UsageError, exit_of

ASK_SECONDS = 0.5  # between two questions of a waiting process
LINGER_SECONDS = 10.0  # how long process 0 goes on answering once it knows how the meeting ends
LINE_SECONDS = 5.0  # for one line to arrive
LINE_BYTES = 8192


class Place(NamedTuple):
    """This process's place in a job of several. `address`: HOST:PORT of process 0."""

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
    """Returns once all processes of the job have come. `failed`: why this one cannot start, which
    ends it for all.

    Raises PeerFailed when the others or process 0 do not come within `seconds`, UsageError when
    they do not fit together, and what another process failed of with its code and text. With
    `failed`, tells who comes within LINGER_SECONDS and returns, whatever it finds."""
    host, port = split_address(place.address)
    hello = {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    if failed:
        hello["failed"] = {"code": failed.code, "text": short(str(failed))}
        seconds = min(seconds, LINGER_SECONDS)
    try:
        (receive if place.process == 0 else ask)(place, host, port, hello, seconds)
    except Exit:
        if not failed:
            raise


def ask(place: Place, host: str, port: int, hello: dict, seconds: float) -> None:
    """The part of every process but 0."""
    begin, heard, seen, strange = time.monotonic(), {}, "no answer", None
    while (now := time.monotonic()) < begin + seconds:
        try:
            with socket.create_connection((host, port), timeout=min(LINE_SECONDS, seconds)) as line:
                write_line(line, hello)
                heard = read_line(line, is_answer) or {}
        except OSError as error:
            seen = str(error)
        else:
            if heard.get("say") == "end":
                raise exit_of(heard["code"], heard["text"])
            # JAX has the port: this job's, its "go" was lost, or that of the job before, soon gone
            if not heard:
                strange = strange or now
            if heard.get("say") == "go" or (not heard and now - strange > LINGER_SECONDS):
                return
        time.sleep(ASK_SECONDS)
    if not heard:
        raise PeerFailed(
            f"--coordinator={place.address}: process {place.process} on {hello['host']} did not reach process "
            f"0 there within --join_seconds={seconds:g} ({seen}); it has not started, its log may have the "
            "reason, or the address is wrong"
        )
    raise PeerFailed(
        f"{heard['text']}, within --join_seconds={seconds:g}; the logs of those missing may have the reason"
    )


def receive(place: Place, host: str, port: int, hello: dict, seconds: float) -> None:
    """The part of process 0: answers until all others have been told the same."""
    came, told, verdict = (
        {0: hello},
        set(),
        hello.get("failed") and dict(hello["failed"], say="end"),
    )
    if verdict:
        verdict["text"] = f"process 0 on {hello['host']} failed: {verdict['text']}"
    end = time.monotonic() + seconds
    with listen(place.address, port) as server:
        while len(told) < place.processes - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
                with line:
                    line.settimeout(LINE_SECONDS)
                    other = read_line(line, is_hello)
                    if other is None:  # a stranger, a port scanner say
                        continue
                    verdict, was = verdict or judge(came, other, place.processes), verdict
                    if verdict and not was:
                        end = time.monotonic() + LINGER_SECONDS
                    write_line(line, verdict or {"say": "wait", "text": missing(came, place)})
                    told |= {other["process"]} if verdict else set()
            except OSError:  # this one comes again, or counts as missing
                continue
    if verdict is None:
        raise PeerFailed(
            f"{missing(came, place)}, within --join_seconds={seconds:g}; the logs of those missing may have "
            "the reason"
        )
    if verdict["say"] == "end":
        raise exit_of(verdict["code"], verdict["text"])
    if gone := set(range(1, place.processes)) - told:
        raise PeerFailed(
            f"{names(gone)} came and went again before the job began; the log there has the reason"
        )


def judge(came: dict[int, dict], other: dict, processes: int) -> dict | None:
    """Notes who came; how the meeting ends, once that is known."""
    process, where = other["process"], f"process {other['process']} on {other['host']}"
    if "failed" in other:
        return {
            "say": "end",
            "code": other["failed"]["code"],
            "text": f"{where} failed: {other['failed']['text']}",
        }
    if other["processes"] != processes:
        return end_usage(
            f"--num_processes: {where} says {other['processes']}, process 0 says {processes}; start all with "
            "the same number"
        )
    before = came.setdefault(process, other)
    if (before["host"], before["pid"]) != (other["host"], other["pid"]):
        return end_usage(
            f"--process_id={process}: two processes say so, one on {before['host']} and one on "
            f"{other['host']}; give each its own"
        )
    return {"say": "go"} if len(came) == processes else None


def end_usage(text: str) -> dict:
    return {"say": "end", "code": UsageError.code, "text": text}


def missing(came: dict, place: Place) -> str:
    """ "2 of 4 processes came to HOST:PORT, missing: processes 1 and 3"."""
    absent = [process for process in range(place.processes) if process not in came]
    return f"{len(came)} of {place.processes} processes came to {place.address}, missing: {names(absent)}"


def names(processes) -> str:
    """ "process 3", or "processes 1, 3 and 5", shortened where there are many."""
    words = [str(process) for process in sorted(processes)]
    words = words if len(words) <= 8 else [*words[:7], f"{len(words) - 7} more"]
    return (
        f"process {words[0]}"
        if len(words) == 1
        else f"processes {', '.join(words[:-1])} and {words[-1]}"
    )


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
        raise UsageError(
            f"--coordinator={address}: process 0 cannot listen on port {port}: {os.strerror(error.errno)}; "
            "is another process 0 there? else choose another port"
        ) from None


def short(text: str) -> str:
    """One that fits into a line whatever is in it."""
    return text if len(text) <= LINE_BYTES // 8 else text[: LINE_BYTES // 8] + " …"


def write_line(line: socket.socket, message: dict) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def has(message: object, **kinds: type) -> bool:
    """Whether this is a dict with these keys, of just these types."""
    return isinstance(message, dict) and all(
        type(message.get(key)) is kind for key, kind in kinds.items()
    )


def is_hello(message: object) -> bool:
    """Whether a process of a job says so, one that is not process 0."""
    return (
        has(message, process=int, processes=int, host=str, pid=int)
        and 0 < message["process"] < message["processes"]
        and ("failed" not in message or has(message["failed"], code=int, text=str))
    )


def is_answer(message: object) -> bool:
    """Whether process 0 of a job says so."""
    say = has(message, say=str) and message["say"]
    return (
        say == "go"
        or (say == "wait" and has(message, text=str))
        or (say == "end" and has(message, text=str, code=int))
    )


def read_line(line: socket.socket, wanted: Callable[[object], bool]) -> dict | None:
    """The other side's message; None for what is not `wanted`. Raises OSError when nothing
    comes."""
    got = b""
    while not got.endswith(b"\n") and len(got) < LINE_BYTES:
        part = line.recv(LINE_BYTES)
        if not part:
            break
        got += part
    if not got:
        raise ConnectionError("closed without an answer")
    try:
        message = json.loads(got)
    except ValueError:
        return None
    return message if wanted(message) else None
