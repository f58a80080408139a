"""How the processes of a job learn that one of them has failed, and how they leave together.

A process that fails says why in the key-value store of JAX's coordination service. A thread of
every other process looks there, and ends its process with the same reason.
"""

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import jax

from gpt_jax.cluster.messages import has
from gpt_jax.errors import RESTARTABLE, PeerFailed, Stopped, complain, plain

# How gloo, NCCL and JAX's coordination service say that another process has left. What else goes
# wrong inside XLA, such as a lack of memory, is this process's own failure.
PEER_GONE = re.compile(
    r"Gloo .*failed|closed by peer|reset by peer|[Rr]emote process (has )?exited|heartbeat timeout|"
    r"[Cc]oordination ?[Ss]ervice|Barrier failed|tasks are unhealthy"
)
GONE = "a peer process is gone without a word"
MOST_NAMED = 8  # silent processes in one line


def is_peer_gone(error: BaseException | None) -> bool:
    """Whether `error` comes of another process of this job having left."""
    if isinstance(error, PeerFailed):
        return True
    if error is None or jax.process_count() == 1:
        return False
    return PEER_GONE.search(str(error)) is not None


class Failure(NamedTuple):
    """What another process of the job said before it left."""

    process: int
    host: str
    code: int
    text: str

    @property
    def line(self) -> str:
        who = f"process {self.process} on {plain(self.host)}, exit code {self.code}"
        return f"a peer process failed: {who}: {plain(self.text)}"

    @property
    def others_code(self) -> int:
        """The exit code of those who hear of it.

        It is 40, but the failure's own code where a restart would only repeat it. SLURM and
        Kubernetes see one code of many, and not always that of the process that began it.
        """
        return PeerFailed.code if self.code in RESTARTABLE else self.code


def read_failure(text: str) -> Failure | None:
    """What a process has written into the store. None for what no process of ours writes."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not has(said, process=int, host=str, code=int, text=str) or len(said) != 4:
        return None
    return Failure(**said)


class Membership:
    """This process's line to the others of its job.

    It goes through the key-value store at process 0. A thread looks there for failures, because
    the main one may be in a collective that never returns. A normal exit would wait for the others
    in a barrier, for minutes if one has failed.
    """

    # Folders of the store. Each holds one entry a process, under its number.
    SAID = "gpt_jax/failed/"
    LEFT = "gpt_jax/left/"
    STOPPED = "gpt_jax/stopped/"
    ALL = "gpt_jax/all_stopped/"
    HOSTS = "gpt_jax/hosts/"
    TURNS = "gpt_jax/turns/"
    SILENT = "gpt_jax/silent/"

    # After so many turns without a sign process 0 names a process as silent. Nobody ends for it.
    SILENT_TURNS = 3
    # After another's failure this process may end by itself: often both saw the same.
    OWN_SECONDS = 2.0
    # Process 0 stays, and the store with it, until the others have read why.
    LINGER_SECONDS = 5.0
    # A stop on request waits so long for the others, because process 0 writes the report.
    STOP_SECONDS = 120.0

    def __init__(self):
        # The client has no public door. Orbax takes it here too.
        from jax._src import distributed

        self.client: Any = distributed.global_state.client
        self.address: str = distributed.global_state.coordinator_address or ""
        self.process = jax.process_index()
        self.processes = jax.process_count()
        self.hosts: dict[int, str] = {}
        self.silent: list[int] = []  # processes without a sign for a while, as process 0 sees it
        self.over = threading.Event()
        self.leaving = threading.Lock()
        # Seconds of a turn. Each process asks process 0 three times in one, so that many processes
        # ask it a thousand times a second.
        self.every = max(1.0, 3 * self.processes / 1000)

        threading.Thread(target=self._watch, daemon=True, name="peers").start()
        atexit.register(self.over.set)  # before JAX takes the client down

    def _watch(self) -> None:
        """The thread: one turn after the other, until a failure is heard of."""
        seen: dict[int, tuple[str, int]] = {}  # process -> (its turn, our turn when it changed)
        turn = 0
        while not self.over.wait(self.every):
            turn += 1
            # Without process 0 there is no store. JAX then ends this process by abort().
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._listen(seen, turn)
            failure = self.failure()
            if failure is not None:
                self.over.wait(self.OWN_SECONDS)
                self.leave(failure.others_code, line=failure.line)

    def _read(self, folder: str) -> dict[int, str]:
        entries = self.client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): text for key, text in entries}

    def _count(self, folder: str) -> int:
        return len(self.client.key_value_dir_get(folder))

    def _write(self, folder: str, text: str) -> None:
        self.client.key_value_set(f"{folder}{self.process}", text, allow_overwrite=True)

    def _listen(self, seen: dict[int, tuple[str, int]], turn: int) -> None:
        """Gives a sign of life, and learns who is silent. Process 0 reads all and tells all."""
        if turn == 1:
            self._write(self.HOSTS, socket.gethostname())
        if len(self.hosts) < self.processes:
            self.hosts = self._read(self.HOSTS)

        if self.process:
            self._write(self.TURNS, str(turn))
            self.silent = json.loads(self._read(self.SILENT).get(0, "[]"))
            return
        for process, text in self._read(self.TURNS).items():
            if process not in seen or seen[process][0] != text:
                seen[process] = text, turn
        self.silent = sorted(
            process for process, (_, last) in seen.items() if turn - last >= self.SILENT_TURNS
        )
        self._write(self.SILENT, json.dumps(self.silent))

    def gone(self, seconds: float = 0.0) -> str:
        """GONE, with number and host of that process if they are known within `seconds`."""
        # Ask about process 0 first, because a process that has named another one leaves soon after.
        if self.process and not self.silent and not self._reaches_0():
            self.silent = [0]

        end = time.monotonic() + seconds
        while not self.silent and time.monotonic() < end:
            time.sleep(0.1)
        names = []
        for process in self.silent[:MOST_NAMED]:
            host = plain(self.hosts.get(process, "a host unknown"))
            names.append(f"process {process} on {host}")
        return f"{GONE}: {', '.join(names)}" if names else GONE

    def _reaches_0(self) -> bool:
        """Whether somebody listens at process 0's address."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            return False
        return True

    def failure(self, seconds: float = 0.0) -> Failure | None:
        """What another process said it failed of, if one does so within `seconds`.

        None also when process 0 is gone, and the store with it.
        """
        end = time.monotonic() + seconds
        while True:
            failures = self._others_failures()
            if failures:
                # Those that are no victims themselves come first.
                return min(failures, key=lambda it: (it.code == PeerFailed.code, it.process))
            if time.monotonic() >= end:
                return None
            time.sleep(0.2)

    def _others_failures(self) -> list[Failure]:
        try:
            texts = self._read(self.SAID)
        except jax.errors.JaxRuntimeError:  # process 0 is gone; JAX ends this process by abort()
            return []
        failures = [read_failure(text) for text in texts.values()]
        return [failure for failure in failures if failure and failure.process != self.process]

    def stop_together(self) -> Failure | None:
        """Waits until all processes have come to their stop on request.

        One that left before would count as gone. Returns the failure of another process if one
        fails meanwhile.
        """
        self._write(self.STOPPED, "")
        end = time.monotonic() + self.STOP_SECONDS
        while True:
            failure = self.failure()
            if failure is not None or time.monotonic() >= end:
                return failure
            if self.process == 0 and self._count(self.STOPPED) == self.processes:
                self._write(self.ALL, "")
                return None
            if self._count(self.ALL):
                return None
            time.sleep(self.every / 5)

    def leave(self, code: int, text: str | None = None, line: str | None = None) -> NoReturn:
        """Ends this process with `code`, after telling the others `text`.

        Standard error gets `line`. Of two threads the second waits for the first to end them both.
        """
        if not self.leaving.acquire(blocking=False):
            time.sleep(self.STOP_SECONDS + self.LINGER_SECONDS)
        if line:
            complain(line)
        # Without process 0 there is nobody to tell.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if code == Stopped.code:  # all of them stop
                failure = self.stop_together()
                if failure is not None:
                    code = failure.others_code
                    complain(failure.line)
            elif text:
                own = Failure(self.process, socket.gethostname(), code, text)
                self._write(self.SAID, json.dumps(own._asdict()))
            self._write(self.LEFT, "")
            if self.process == 0:
                self._linger()
        os._exit(code)

    def _linger(self) -> None:
        """Keeps the store up until all others have left, for a while."""
        end = time.monotonic() + self.LINGER_SECONDS
        while time.monotonic() < end and self._count(self.LEFT) < self.processes:
            time.sleep(0.1)


# The job that this process has joined: threads, and the end of the program, have to know it.
JOBS: list[Membership] = []


def end_process(code: int, text: str) -> NoReturn:
    """os._exit with `code`, from any thread, after telling the other processes why."""
    sys.stderr.flush()
    if JOBS:
        JOBS[0].leave(code, text)
    os._exit(code)
