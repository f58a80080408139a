"""Several real processes on one machine.

They are started together, ended together, and started again where that helps.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from gpt_jax.cluster.rendezvous import SECRET
from gpt_jax.errors import EXIT_CODES, RESTARTABLE, PeerFailed, mute, restart_seconds

MOST_PROCESSES = 256  # of one machine
# Once one has failed, the others have so long to go by themselves. Then they are killed.
TOGETHER_SECONDS = 12.0
# After an attempt that ran so long the wait begins anew. The limit of restarts counts all.
QUIET_SECONDS = 300.0
# After the end of a process its output is read so long. What it has started may hold the pipe.
READ_SECONDS = 5.0
# Signal -> what the processes get for it. A terminal that closes is a request to save and stop.
REQUESTS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in prctl.h


class LocalGroup(NamedTuple):
    """The processes of this machine, of `nodes` machines that run as many each."""

    processes: int
    devices: int  # fake CPU devices of each; 0: accelerator k of the machine for process k
    coordinator: str = ""  # HOST:PORT; "": a free port here
    nodes: int = 1
    node: int = 0


def command_lines(group: LocalGroup, arguments: list[str]) -> list[list[str]]:
    """What each process of this machine runs: `arguments` and its place in the job."""
    total = group.processes * group.nodes
    if total == 1 and not group.devices:
        return [[sys.executable, "-m", "gpt_jax", *arguments]]

    address = group.coordinator or f"127.0.0.1:{find_free_port()}"
    lines = []
    for k in range(group.processes):
        line = [sys.executable, "-m", "gpt_jax", *arguments]
        if total > 1:
            process = group.node * group.processes + k
            line += [f"--coordinator={address}", f"--num_processes={total}"]
            line.append(f"--process_id={process}")
        if group.devices:
            line.append(f"--cpu_devices={group.devices}")
        elif group.processes > 1:
            line.append(f"--local_device={k}")
        lines.append(line)
    return lines


def find_free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(
    group: LocalGroup,
    arguments: list[str],
    restarts: int,
    say: Callable[[str], None],
    environ: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Runs the job, and starts it again at most `restarts` times.

    It ends when the job is done, or with a code that a restart cannot help. SIGTERM, SIGUSR1 and
    SIGINT go to all processes, and SIGHUP as SIGTERM. The processes have the variables `environ`,
    or those of this one. Returns the exit code of the process that began the end, and a line.
    """
    used = 0  # restarts
    quick = 0  # restarts since an attempt that ran long
    with pass_on_requests(add_secret(environ, group.nodes)) as requests:
        while True:
            began = time.monotonic()
            code, words = attempt(group, arguments, requests, say)
            if time.monotonic() - began > QUIET_SECONDS:
                quick = 0
            if code == 0:
                return 0, words

            meaning = EXIT_CODES.get(code, "a bug" if code == 1 else "unknown")
            end = f"{words}: exit code {code} ({meaning})"
            if requests.asked.is_set():
                return code, f"{end}; asked to stop"
            if code not in RESTARTABLE:
                return code, f"{end}; a restart would not help"
            if used >= restarts:
                return code, f"{end}; no restarts left of {restarts}"

            wait = restart_seconds(quick)
            used += 1
            quick += 1
            say(f"launch: {end}; restart {used} of {restarts} in {wait} s")
            if requests.asked.wait(wait):
                return code, f"{end}; asked to stop"


def add_secret(environ: Mapping[str, str] | None, nodes: int) -> Mapping[str, str] | None:
    """The variables with a secret of the job, unless they have one.

    The launchers of several machines cannot agree on one, so there it comes from outside.
    """
    if environ is None or nodes > 1:
        return environ
    return {SECRET: secrets.token_hex(16), **environ}


class Requests:
    """The signals of REQUESTS, passed on to the processes of the job.

    Processes that start after a signal has come get it too.
    """

    def __init__(self, environ: Mapping[str, str] | None = None):
        self.variables = environ
        self.processes: list[subprocess.Popen] = []
        self.asked = threading.Event()  # whether a signal came
        self.number = 0  # of the last one

    def start(self, line: list[str], **streams) -> None:
        """Starts a process in a session of its own.

        Ctrl-C then reaches the processes once, through this one. If this one is killed, they are
        asked to stop.
        """
        process = subprocess.Popen(
            line,
            start_new_session=True,
            env=self.variables,
            preexec_fn=make_follower(os.getpid()),
            **streams,
        )
        self.processes.append(process)
        if self.asked.is_set():  # perhaps before this process was in the list
            process.send_signal(self.number)

    def pass_on(self, number: int, _) -> None:
        """The handler. A second Ctrl-C kills."""
        is_second = self.asked.is_set() and number == signal.SIGINT
        self.number = signal.SIGKILL if is_second else REQUESTS[signal.Signals(number)]
        self.asked.set()
        for process in list(self.processes):
            if process.poll() is None:
                process.send_signal(self.number)


def make_follower(parent: int) -> Callable[[], None] | None:
    """What a new process does first, so that it gets SIGTERM when the process `parent` ends.

    None on systems other than Linux, which have no such request.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Between fork and exec nothing is loaded any more, because threads may have held locks.
    ask_kernel = ctypes.CDLL(None).prctl

    def follow() -> None:
        ask_kernel(DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # It has ended meanwhile.
            os._exit(PeerFailed.code)

    return follow


@contextmanager
def pass_on_requests(environ: Mapping[str, str] | None = None) -> Iterator[Requests]:
    """Requests to stop go to the job in here."""
    requests = Requests(environ)
    numbers = list(REQUESTS)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup has it
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, requests.pass_on) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in requests.processes:  # an error here: leave nothing behind
            process.kill()


def attempt(
    group: LocalGroup, arguments: list[str], requests: Requests, say: Callable[[str], None]
) -> tuple[int, str]:
    """One start of all processes: (exit code of the one that began the end, how it ended)."""
    processes = requests.processes
    first = group.node * group.processes
    for k, line in enumerate(command_lines(group, arguments)):
        # Process 0 has the terminal. The others' lines get their number.
        if first + k == 0:
            requests.start(line)
        else:
            requests.start(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    readers = []
    for k, process in enumerate(processes):
        if process.stdout:
            mark = f"[{first + k}] "
            reader = threading.Thread(target=copy_lines, args=(process.stdout, mark), daemon=True)
            reader.start()
            readers.append(reader)

    ended, killed = wait_for_all(requests, first, say)
    for reader in readers:
        reader.join(READ_SECONDS)
    processes.clear()
    codes = {first + k: code for k, code in ended.items()}
    return find_verdict(codes, {first + k for k in killed})


def wait_for_all(
    requests: Requests, first: int, say: Callable[[str], None]
) -> tuple[dict[int, int], set[int]]:
    """({process: its return code} in the order of the ends, those that were killed here).

    A process that outlives another's failure by TOGETHER_SECONDS is killed.
    """
    processes = requests.processes
    ended: dict[int, int] = {}
    killed: set[int] = set()
    deadline = None
    while len(ended) < len(processes):
        time.sleep(0.05)
        for k, process in enumerate(processes):
            if k not in ended and process.poll() is not None:
                ended[k] = process.returncode

        if deadline is None and any(ended.values()) and not requests.asked.is_set():
            deadline = time.monotonic() + TOGETHER_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for k, process in enumerate(processes):
                if process.poll() is None:
                    say(
                        f"launch: process {first + k} is still there {TOGETHER_SECONDS:g} s after "
                        "another has failed: killed"
                    )
                    process.kill()
                    killed.add(k)
            deadline = float("inf")
    return ended, killed


def find_verdict(ended: dict[int, int], killed: Collection[int] = ()) -> tuple[int, str]:
    """(exit code, words) of the process that began the end of all.

    `ended` has return codes in the order of the ends. `killed` were ended by this launcher, and so
    are no reason for anything.
    """
    failed = {k: code for k, code in ended.items() if code and k not in killed}
    if not failed:
        return 0, "done"

    # Those that only heard of another's failure come last.
    reasons = [k for k, code in failed.items() if code != PeerFailed.code]
    k = (reasons or [*failed])[0]
    code = failed[k]
    if code < 0:  # by a signal: its peers, and a scheduler, can only say that it is gone
        return PeerFailed.code, f"process {k} was killed by {signal.Signals(-code).name}"
    return code, f"process {k} ended first" if len(ended) > 1 else f"process {k} ended"


def copy_lines(stream: BinaryIO, mark: str) -> None:
    """Copies lines to standard error, each with `mark` before it.

    It reads on if nobody takes them any more, as with `2>&1 | head`, or if the disk is full. The
    process would otherwise stand still as soon as its pipe is full.
    """
    for line in iter(stream.readline, b""):
        try:
            sys.stderr.buffer.write(mark.encode() + line)
            sys.stderr.buffer.flush()
        except OSError:
            mute("stderr")
