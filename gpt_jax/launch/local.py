"""Several real processes on one machine: started together, ended together, and started again where that helps."""

import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator, NamedTuple

from gpt_jax.errors import EXIT_CODES, RESTARTABLE, PeerFailed, restart_seconds

TOGETHER_SECONDS = 12.0  # for the others to go by themselves once one has failed; then they are killed
QUIET_SECONDS = 300.0  # an attempt that ran so long starts the count of restarts anew


class Group(NamedTuple):
    """The processes of this machine. `nodes` machines run as many each; `coordinator` "": a free port here."""

    processes: int
    devices: int  # fake CPU devices of each; 0: accelerator k of the machine for process k
    coordinator: str = ""
    nodes: int = 1
    node: int = 0


def command_lines(group: Group, arguments: list[str]) -> list[list[str]]:
    """What each process of this machine runs: `arguments` and its place in the job."""
    total = group.processes * group.nodes
    if total == 1 and not group.devices:
        return [[sys.executable, "-m", "gpt_jax", *arguments]]
    address = group.coordinator or f"127.0.0.1:{free_port()}"
    job = [f"--coordinator={address}", f"--num_processes={total}"] if total > 1 else []
    return [[sys.executable, "-m", "gpt_jax", *arguments, *job,
             *([f"--process_id={group.node * group.processes + k}"] if total > 1 else []),
             *([f"--cpu_devices={group.devices}"] if group.devices else
               [f"--local_device={k}"] if group.processes > 1 else [])] for k in range(group.processes)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(group: Group, arguments: list[str], restarts: int, say: Callable[[str], None]) -> tuple[int, str]:
    """Runs the job until it is done, until it ends with a code that a restart cannot help, or `restarts` times more.
    Returns the exit code of the process that began the end, and a line. SIGTERM, SIGUSR1 and SIGINT go to all processes."""
    used = 0
    with passed_on() as (processes, asked):
        while True:
            began = time.monotonic()
            code, words = attempt(group, arguments, processes, asked, say)
            used = 0 if time.monotonic() - began > QUIET_SECONDS else used
            if code == 0:
                return 0, words
            end = f"{words}: exit code {code} ({EXIT_CODES.get(code, 'a bug' if code == 1 else 'unknown')})"
            if asked.is_set():
                return code, f"{end}; asked to stop"
            if code not in RESTARTABLE:
                return code, f"{end}; a restart would not help"
            if used >= restarts:
                return code, f"{end}; no restarts left of {restarts}"
            wait = restart_seconds(used)
            used += 1
            say(f"launch: {end}; restart {used} of {restarts} in {wait} s")
            if asked.wait(wait):
                return code, f"{end}; asked to stop"


def attempt(group: Group, arguments: list[str], processes: list, asked: threading.Event,
            say: Callable[[str], None]) -> tuple[int, str]:
    """One start of all processes: (exit code of the one that began the end, how it ended)."""
    lines = command_lines(group, arguments)
    first = group.node * group.processes
    # Process 0 has the terminal; the others' lines get their number. Sessions of their own: Ctrl-C reaches them once,
    # through this process.
    processes[:] = [subprocess.Popen(line, start_new_session=True, **({} if first + k == 0 else
                    dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT))) for k, line in enumerate(lines)]
    readers = [threading.Thread(target=prefix, args=(process.stdout, f"[{first + k}] "), daemon=True)
               for k, process in enumerate(processes) if process.stdout]
    for reader in readers:
        reader.start()
    ended: dict[int, int] = {}  # in the order of their ends
    deadline = None
    while len(ended) < len(processes):
        time.sleep(0.05)
        for k, process in enumerate(processes):
            if k not in ended and process.poll() is not None:
                ended[k] = process.returncode
        if deadline is None and any(ended.values()) and not asked.is_set():
            deadline = time.monotonic() + TOGETHER_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for k in (k for k, process in enumerate(processes) if process.poll() is None):
                say(f"launch: process {first + k} is still there {TOGETHER_SECONDS:g} s after another has failed: killed")
                processes[k].kill()
            deadline = float("inf")
    for reader in readers:
        reader.join()
    processes.clear()
    return verdict({first + k: code for k, code in ended.items()})


def verdict(ended: dict[int, int]) -> tuple[int, str]:
    """(exit code, words) of the process that began the end of all. `ended`: return codes in the order of ends."""
    failed = {k: code for k, code in ended.items() if code}
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
def passed_on() -> Iterator[tuple[list, threading.Event]]:
    """(processes to pass signals on to, whether a request to stop came). A second Ctrl-C kills them."""
    processes, asked = [], threading.Event()

    def pass_on(number, _):
        number = signal.SIGKILL if asked.is_set() and number == signal.SIGINT else number
        asked.set()
        for process in list(processes):
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield processes, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:  # an error here: leave nothing behind
            process.kill()
