"""When a run ends before its last step: requests to stop, the watchdog for hangs, the signs that
a peer process is gone, and how a process that fails tells the others (floor 0; called by loop,
checkpoint and commands)."""

import atexit
import json
import os
import re
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax

from gpt_jax.errors import RESTARTABLE, PeerFailed, Stopped, complain

# How the libraries below say that another process has left: gloo, NCCL, JAX's coordination service.
# What else goes wrong inside XLA (out of memory, say) is this process's own failure.
PEER_GONE = re.compile(
    r"Gloo .*failed|closed by peer|reset by peer|[Rr]emote process (has )?exited|heartbeat timeout|"
    r"[Cc]oordination ?[Ss]ervice|Barrier failed|tasks are unhealthy"
)


def is_peer_gone(error: BaseException | None) -> bool:
    """Whether `error` comes of another process of this job having left."""
    return isinstance(error, PeerFailed) or (
        error is not None and jax.process_count() > 1 and PEER_GONE.search(str(error)) is not None
    )


class Failure(NamedTuple):
    """What another process of the job said before it left."""

    process: int
    host: str
    code: int
    text: str

    @property
    def line(self) -> str:
        return f"a peer process failed: process {self.process} on {self.host}, exit code {self.code}: {self.text}"

    @property
    def others_code(self) -> int:
        """How those leave who hear of it: 40, but with its own code where a restart would only
        repeat it. SLURM and Kubernetes see one code of many, and not always that of the process
        that began it."""
        return PeerFailed.code if self.code in RESTARTABLE else self.code


class Membership:
    """This process's line to the others of its job: the key-value store of JAX's coordination
    service, at process 0.

    A thread looks there for failures, since the main one may be in a collective that never
    returns, and a normal exit would wait for the others in a barrier, for minutes when one has
    failed."""

    SAID, LEFT, STOPPED, ALL = (
        "gpt_jax/failed/",
        "gpt_jax/left/",
        "gpt_jax/stopped/",
        "gpt_jax/all_stopped/",
    )
    HOSTS, TURNS, SILENT = "gpt_jax/hosts/", "gpt_jax/turns/", "gpt_jax/silent/"
    # of the others' threads, after which process 0 names a process; to say it only, none ends of
    # that
    SILENT_TURNS = 3
    OWN_SECONDS = (
        2.0  # for this process to end by itself after another has failed: often both saw the same
    )
    LINGER_SECONDS = 5.0  # process 0 stays, and with it the store, until the others have read why
    STOP_SECONDS = 120.0  # to wait for the others at a stop on request: process 0 writes the report

    def __init__(self):
        from jax._src import distributed  # the client has no public door; Orbax takes it here too

        self.client, self.process, self.processes = (
            distributed.global_state.client,
            jax.process_index(),
            jax.process_count(),
        )
        self.address = distributed.global_state.coordinator_address
        self.hosts: dict[int, str] = {}
        self.silent: list[
            int
        ] = []  # processes that have not been heard of for a while, as process 0 finds it
        self.over, self.leaving = threading.Event(), threading.Lock()
        self.every = max(
            1.0, 3 * self.processes / 1000
        )  # seconds; process 0 is asked three times by each
        threading.Thread(target=self._watch, daemon=True, name="peers").start()
        atexit.register(self.over.set)  # before JAX takes the client down

    def _watch(self) -> None:
        seen, turn = {}, 0  # process -> (its turn, when it was first seen here)
        while not self.over.wait(self.every):
            turn += 1
            try:
                self._listen(seen, turn)
            except jax.errors.JaxRuntimeError:  # as in `failure`
                pass
            if (found := self.failure()) is not None:
                self.over.wait(self.OWN_SECONDS)
                self.leave(found.others_code, line=found.line)

    def _read(self, folder: str) -> dict[int, str]:
        return {
            int(key.rpartition("/")[2]): text for key, text in self.client.key_value_dir_get(folder)
        }

    def _listen(self, seen: dict[int, tuple[str, int]], turn: int) -> None:
        """One turn of the thread: says that it is there, and learns who is silent. Process 0
        reads all and tells all."""
        if turn == 1:
            self.client.key_value_set(f"{self.HOSTS}{self.process}", socket.gethostname())
        if len(self.hosts) < self.processes:
            self.hosts = self._read(self.HOSTS)
        if self.process:
            self.client.key_value_set(
                f"{self.TURNS}{self.process}", str(turn), allow_overwrite=True
            )
            self.silent = json.loads(self._read(self.SILENT).get(0, "[]"))
            return
        for process, text in self._read(self.TURNS).items():
            if seen.get(process, ("",))[0] != text:
                seen[process] = text, turn
        self.silent = sorted(
            process for process, (_, last) in seen.items() if turn - last >= self.SILENT_TURNS
        )
        self.client.key_value_set(f"{self.SILENT}0", json.dumps(self.silent), allow_overwrite=True)

    def gone(self, seconds: float = 0.0) -> str:
        """ "a peer process is gone without a word", with its number and host if they are known
        within `seconds`."""
        end, line = time.monotonic() + seconds, "a peer process is gone without a word"
        if (
            self.process and not self.silent and not self._reaches_0()
        ):  # who names another leaves by itself, right after
            self.silent = [0]
        while not self.silent and time.monotonic() < end:
            time.sleep(0.1)
        names = [
            f"process {process} on {self.hosts.get(process, 'a host unknown')}"
            for process in self.silent[:8]
        ]
        return line + (f": {', '.join(names)}" if names else "")

    def _reaches_0(self) -> bool:
        """Whether somebody listens at process 0's address."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
        except OSError:
            return False
        return True

    def failure(self, seconds: float = 0.0) -> Failure | None:
        """What another process said it failed of, if one does so within `seconds`. None also
        when process 0 is gone."""
        end = time.monotonic() + seconds
        while True:
            try:
                said = [
                    Failure(**json.loads(text))
                    for _, text in self.client.key_value_dir_get(self.SAID)
                ]
            except (
                jax.errors.JaxRuntimeError
            ):  # the store is gone with process 0; JAX ends this process by abort()
                said = []
            said = [found for found in said if found.process != self.process]
            if said or time.monotonic() >= end:  # first those that are not victims themselves
                return min(
                    said,
                    key=lambda found: (found.code == PeerFailed.code, found.process),
                    default=None,
                )
            time.sleep(0.2)

    def stop_together(self) -> Failure | None:
        """Waits until all processes have come to their stop on request: one that left before
        would count as gone. What another fails of meanwhile, if one does."""
        self.client.key_value_set(f"{self.STOPPED}{self.process}", "")
        end = time.monotonic() + self.STOP_SECONDS
        while (found := self.failure()) is None and time.monotonic() < end:
            if (
                self.process == 0
                and len(self.client.key_value_dir_get(self.STOPPED)) == self.processes
            ):
                self.client.key_value_set(f"{self.ALL}0", "")
                break
            if self.client.key_value_dir_get(self.ALL):
                break
            time.sleep(self.every / 5)
        return found

    def leave(self, code: int, text: str | None = None, line: str | None = None) -> None:
        """Ends this process with `code`, after telling the others `text` and standard error
        `line`. Never returns: of two threads the second waits for the first to end them both."""
        if not self.leaving.acquire(blocking=False):
            time.sleep(self.STOP_SECONDS + self.LINGER_SECONDS)
        if line:
            complain(line)
        try:
            if code == Stopped.code:  # all of them stop
                if (found := self.stop_together()) is not None:
                    code = found.others_code
                    complain(found.line)
            elif text:
                said = Failure(self.process, socket.gethostname(), code, text)
                self.client.key_value_set(f"{self.SAID}{self.process}", json.dumps(said._asdict()))
            self.client.key_value_set(f"{self.LEFT}{self.process}", "")
            end = time.monotonic() + self.LINGER_SECONDS
            while (
                self.process == 0
                and time.monotonic() < end
                and len(self.client.key_value_dir_get(self.LEFT)) < self.processes
            ):
                time.sleep(0.1)
        except jax.errors.JaxRuntimeError:  # process 0 is gone: nobody to tell
            pass
        os._exit(code)


JOBS: list[
    Membership
] = []  # the job this process has joined: threads and the end of the program have to find it


def end_process(code: int, text: str) -> None:
    """os._exit with `code`, from any thread, after telling the other processes why."""
    sys.stderr.flush()
    if JOBS:
        JOBS[0].leave(code, text)
    os._exit(code)
