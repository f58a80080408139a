"""One line of JSON each way over a short connection, sealed with the secret of a job.

Whoever can reach the port may connect, say nothing, speak slowly or lie. So a connection has
LINE_SECONDS in all, many are read at once, and a message counts only under the seal of the job.
"""

import hmac
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpt_jax.errors import EXIT_CODES

LINE_SECONDS = 5.0  # for one line to arrive, however it is cut into pieces
LINE_BYTES = 8192
MOST_CALLERS = 512  # connections that are read at once; the oldest one makes room
MOST_HOST = 255  # characters of a host's name, the limit of DNS
SEAL = "seal"  # the key of a message that holds its seal


def seal(message: dict, secret: str) -> dict[str, Any]:
    """The message with a seal that only those who know `secret` can make."""
    return {**message, SEAL: sign(message, secret)}


def sign(message: dict, secret: str) -> str:
    text = json.dumps(message, sort_keys=True)
    return hmac.new(secret.encode("utf-8", "replace"), text.encode(), "sha256").hexdigest()


def is_sealed(message: dict, secret: str) -> bool:
    """Whether the message has the seal of `secret`."""
    rest = {key: value for key, value in message.items() if key != SEAL}
    given = message.get(SEAL)
    if not isinstance(given, str):
        return False
    return hmac.compare_digest(given.encode("utf-8", "replace"), sign(rest, secret).encode())


def shorten(text: str) -> str:
    """A text that fits into a line whatever is in it."""
    most = LINE_BYTES // 16  # JSON takes up to 12 bytes for a character
    return text if len(text) <= most else text[:most] + " …"


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
    if "failed" in message:
        failed = message["failed"]
        # A process that has failed says so with a code of our own, or with 1 for a bug.
        if not has(failed, code=int, text=str) or failed["code"] not in {1, *EXIT_CODES} - {0}:
            return False
    if not 0 < len(message["host"]) <= MOST_HOST or message["pid"] < 1:
        return False
    return 0 < message["process"] < message["processes"]


def is_answer(message: object) -> bool:
    """Whether process 0 of a job says so."""
    if not isinstance(message, dict):
        return False
    needed = {"go": {}, "refused": {}, "wait": dict(text=str), "end": dict(text=str, code=int)}
    say = message.get("say")
    return isinstance(say, str) and say in needed and has(message, **needed[say])


def parse(text: bytes, is_wanted: Callable[[object], bool]) -> dict | None:
    """The message of a line, or None if it is no message or not wanted."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return message if is_wanted(message) else None


def write_line(line: socket.socket, message: dict) -> None:
    """Sends a message. Raises OSError."""
    line.sendall(json.dumps(message).encode() + b"\n")


def read_line(line: socket.socket) -> bytes:
    """The line of the other side. Raises OSError if none has come whole within LINE_SECONDS."""
    end = time.monotonic() + LINE_SECONDS
    received = b""
    while not is_whole(received):
        line.settimeout(max(0.001, end - time.monotonic()))
        part = line.recv(LINE_BYTES)
        if not part:
            break
        received += part
    if not received:
        raise ConnectionError("closed without an answer")
    return received


def is_whole(received: bytes | bytearray) -> bool:
    """Whether a line has come to its end, or to the limit."""
    return received.endswith(b"\n") or len(received) >= LINE_BYTES


class Caller(NamedTuple):
    """A connection whose line is under way."""

    line: socket.socket
    end: float  # of its time, by `time.monotonic`
    received: bytearray


class Callers:
    """The connections to a server, which are all read at once. Use it in a `with` statement."""

    def __init__(self, server: socket.socket):
        self.server = server
        self.selector = selectors.DefaultSelector()
        self.callers: dict[socket.socket, Caller] = {}  # the oldest first

    def __enter__(self):
        self.server.setblocking(False)
        self.selector.register(self.server, selectors.EVENT_READ)
        return self

    def __exit__(self, *_):
        for caller in list(self.callers.values()):
            self.hang_up(caller)
        self.selector.close()

    def listen(self, seconds: float) -> Iterator[tuple[Caller, bytes]]:
        """Yields each connection whose line has come, with the line. It ends within `seconds`.

        Whoever takes a line answers it with `reply` before the next one.
        """
        now = time.monotonic()
        for caller in [caller for caller in self.callers.values() if caller.end <= now]:
            self.hang_up(caller)
        # All have equally long, so the oldest is the first whose time ends.
        ends = [caller.end - now for caller in list(self.callers.values())[:1]]

        for key, _ in self.selector.select(max(0.0, min([seconds, *ends]))):
            if key.fileobj is self.server:
                self._accept()
                continue
            caller = self.callers.get(key.fileobj)  # pyright: ignore[reportArgumentType] # a socket
            if caller is not None and self._receive(caller):
                yield caller, bytes(caller.received)
                self.hang_up(caller)

    def reply(self, caller: Caller, message: dict) -> bool:
        """Whether the message could be sent."""
        try:
            write_line(caller.line, message)
        except OSError:  # It is gone, or does not read. An honest process asks again.
            return False
        return True

    def hang_up(self, caller: Caller) -> None:
        """Closes a connection. Closing it again does nothing."""
        if self.callers.pop(caller.line, None) is not None:
            self.selector.unregister(caller.line)
            caller.line.close()

    def _accept(self) -> None:
        try:
            line, _ = self.server.accept()
        except (BlockingIOError, ConnectionError):  # It has gone again.
            return
        except OSError:  # This process has no file left for one more connection.
            for caller in list(self.callers.values())[:1]:
                self.hang_up(caller)
            time.sleep(0.01)
            return

        line.setblocking(False)
        self.callers[line] = Caller(line, time.monotonic() + LINE_SECONDS, bytearray())
        self.selector.register(line, selectors.EVENT_READ)
        for caller in list(self.callers.values())[: max(0, len(self.callers) - MOST_CALLERS)]:
            self.hang_up(caller)

    def _receive(self, caller: Caller) -> bool:
        """Takes what has come. Returns whether the line is whole."""
        try:
            part = caller.line.recv(LINE_BYTES)
        except OSError:
            part = b""
        if not part:  # It has gone before its line was whole.
            self.hang_up(caller)
            return False
        caller.received.extend(part)
        return is_whole(caller.received)
