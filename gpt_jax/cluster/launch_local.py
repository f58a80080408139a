"""Several real processes on one machine: started together, ended together, and started again
where that helps."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gpt_jax.errors import EXIT_CODES, RESTARTABLE, PeerFailed, restart_seconds

MOST_PROCESSES = 256  # of one machine
TOGETHER_SECONDS = (
    12.0  # for the others to go by themselves once one has failed; then they are killed
)
# after an attempt that ran so long, the wait begins anew; the limit of restarts counts all
QUIET_SECONDS = 300.0


class LocalGroup(NamedTuple):
    """The processes of this machine. `nodes` machines run as many each; `coordinator` "": a free
    port here."""

    processes: int
    devices: int  # fake CPU devices of each; 0: accelerator k of the machine for process k
    coordinator: str = ""
    nodes: int = 1
    node: int = 0


def command_lines(group: LocalGroup, arguments: list[str]) -> list[list[str]]:
    """What each process of this machine runs: `arguments` and its place in the job."""
    total = group.processes * group.nodes
    if total == 1 and not group.devices:
        return [[sys.executable, "-m", "gpt_jax", *arguments]]
    address = group.coordinator or f"127.0.0.1:{free_port()}"
    job = [f"--coordinator={address}", f"--num_processes={total}"] if total > 1 else []
    return [
        [
            sys.executable,
            "-m",
            "gpt_jax",
            *arguments,
            *job,
            *([f"--process_id={group.node * group.processes + k}"] if total > 1 else []),
            *(
                [f"--cpu_devices={group.devices}"]
                if group.devices
                else [f"--local_device={k}"]
                if group.processes > 1
                else []
            ),
        ]
        for k in range(group.processes)
    ]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(
    group: LocalGroup, arguments: list[str], restarts: int, say: Callable[[str], None]
) -> tuple[int, str]:
    """Runs the job until it is done, until it ends with a code that a restart cannot help, or
    `restarts` times more. Returns the exit code of the process that began the end, and a line.
    SIGTERM, SIGUSR1 and SIGINT go to all processes."""
    used = quick = 0  # restarts: all, and those since an attempt that ran long
    with passed_on() as requests:
        while True:
            began = time.monotonic()
            code, words = attempt(group, arguments, requests, say)
            quick = 0 if time.monotonic() - began > QUIET_SECONDS else quick
            if code == 0:
                return 0, words
            end = f"{words}: exit code {code} ({EXIT_CODES.get(code, 'a bug' if code == 1 else 'unknown')})"
            if requests.asked.is_set():
                return code, f"{end}; asked to stop"
            if code not in RESTARTABLE:
                return code, f"{end}; a restart would not help"
            if used >= restarts:
                return code, f"{end}; no restarts left of {restarts}"
            wait = restart_seconds(quick)
            used, quick = used + 1, quick + 1
            say(f"launch: {end}; restart {used} of {restarts} in {wait} s")
            if requests.asked.wait(wait):
                return code, f"{end}; asked to stop"


class Requests:
    """SIGTERM, SIGUSR1 and SIGINT, passed on to the processes of the job, those included that
    start when one has come."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self.asked = threading.Event()  # whether one came
        self.number = 0  # and which was the last

    def start(self, line: list[str], **streams) -> None:
        """Sessions of their own: Ctrl-C reaches the processes once, through this one."""
        process = subprocess.Popen(line, start_new_session=True, **streams)
        self.processes.append(process)
        if self.asked.is_set():  # perhaps before this process was in the list
            process.send_signal(self.number)

    def pass_on(self, number: int, _) -> None:
        """The handler. A second Ctrl-C kills."""
        self.number = signal.SIGKILL if self.asked.is_set() and number == signal.SIGINT else number
        self.asked.set()
        for process in list(self.processes):
            if process.poll() is None:
                process.send_signal(self.number)


def attempt(
    group: LocalGroup, arguments: list[str], requests: Requests, say: Callable[[str], None]
) -> tuple[int, str]:
    """One start of all processes: (exit code of the one that began the end, how it ended)."""
    processes, first = requests.processes, group.node * group.processes
    for k, line in enumerate(command_lines(group, arguments)):
        # Process 0 has the terminal; the others' lines get their number.
        requests.start(
            line,
            **({} if first + k == 0 else dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)),
        )
    readers = [
        threading.Thread(target=prefix, args=(process.stdout, f"[{first + k}] "), daemon=True)
        for k, process in enumerate(processes)
        if process.stdout
    ]
    for reader in readers:
        reader.start()
    ended: dict[int, int] = {}  # in the order of their ends
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
            for k in (k for k, process in enumerate(processes) if process.poll() is None):
                say(
                    f"launch: process {first + k} is still there {TOGETHER_SECONDS:g} s after another has failed: killed"
                )
                processes[k].kill()
                killed.add(k)
            deadline = float("inf")
    for reader in readers:
        reader.join()
    processes.clear()
    return verdict({first + k: code for k, code in ended.items()}, {first + k for k in killed})


def verdict(ended: dict[int, int], killed: set[int] = frozenset()) -> tuple[int, str]:
    """(exit code, words) of the process that began the end of all. `ended`: return codes in the
    order of ends; `killed`: by this launcher, and so no reason for anything."""
    failed = {k: code for k, code in ended.items() if code and k not in killed}
    if not failed:
        return 0, "done"
    k = next((k for k, code in failed.items() if code != PeerFailed.code), next(iter(failed)))
    if failed[k] < 0:  # by a signal: its peers, and a scheduler, can only say that it is gone
        return PeerFailed.code, f"process {k} was killed by {signal.Signals(-failed[k]).name}"
    return failed[k], f"process {k} ended first" if len(ended) > 1 else f"process {k} ended"


def prefix(stream, mark: str) -> None:
    """Copies lines to standard error, each with `mark` before it."""
    for line in iter(stream.readline, b""):
        sys.stderr.buffer.write(mark.encode() + line)
        sys.stderr.buffer.flush()


@contextmanager
def passed_on() -> Iterator[Requests]:
    """Requests to stop go to the job in here."""
    requests = Requests()
    before = {
        number: signal.signal(number, requests.pass_on)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in requests.processes:  # an error here: leave nothing behind
            process.kill()
