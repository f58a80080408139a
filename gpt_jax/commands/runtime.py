"""The runtime of a command: devices, processes, memory allocator and signals."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from gpt_jax.cluster import JobFlags, join_job, split_address, tell_problems
from gpt_jax.commands import compile_cache, environment
from gpt_jax.commands.stopping import ignore_requests
from gpt_jax.errors import Stopped, UsageError

# Each fake device has threads of its own.
MOST_CPU_DEVICES = 1024
# The longest wait for another process: a day.
LONGEST_SECONDS = 86400

# Parameters of mallopt in malloc.h, and what `keep_memory` sets.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8
MALLOC = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28, M_ARENA_MAX: 1}


def add_runtime_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags that say how many devices and processes take part."""
    group = flags.add_argument_group("devices and processes")
    group.add_argument(
        "--cpu_devices",
        type=int,
        default=0,
        metavar="N",
        help="run on N fake CPU devices, to try a mesh without hardware; 0: the real devices",
    )

    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 of a job of several processes",
    )
    group.add_argument("--num_processes", type=int, default=1, help="processes of the job")
    group.add_argument("--process_id", type=int, default=0, help="which of them this is")
    group.add_argument(
        "--join_seconds",
        type=int,
        default=300,
        help="how long the processes wait for each other at the start",
    )
    group.add_argument(
        "--heartbeat_seconds",
        type=int,
        default=10,
        help="a process that is silent for so long counts as gone; "
        "raise it where the network has gaps",
    )
    group.add_argument(
        "--local_device",
        type=int,
        metavar="K",
        help="use this one of the machine's accelerators only (one process for each)",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find coordinator and processes from the cluster (TPU pod, SLURM)",
    )

    group.add_argument(
        "--compilation_cache",
        metavar="DIR",
        help=f"where compiled programs are kept for the next start; {compile_cache.OFF}: nowhere; "
        f"by default {compile_cache.FOLDER}, or what {compile_cache.FOLDER_VARIABLE} names",
    )


def check_runtime(args: argparse.Namespace) -> None:
    """Raises UsageError for runtime flags that make no sense, before anything is started."""
    if not 0 <= args.cpu_devices <= MOST_CPU_DEVICES:
        raise UsageError(f"--cpu_devices={args.cpu_devices}: expected 0 to {MOST_CPU_DEVICES}")
    if args.num_processes < 1:
        raise UsageError(f"--num_processes={args.num_processes}: expected 1 or more")
    for name in ("join_seconds", "heartbeat_seconds"):
        if not 1 <= getattr(args, name) <= LONGEST_SECONDS:
            raise UsageError(f"--{name}={getattr(args, name)}: expected 1 to {LONGEST_SECONDS}")

    if args.local_device is not None and args.local_device < 0:
        raise UsageError(f"--local_device={args.local_device}: expected 0 or more")
    if args.local_device is not None and args.num_processes == 1 and not args.distributed:
        raise UsageError(
            f"--local_device={args.local_device}: is for one process of several; "
            f"for a single one set CUDA_VISIBLE_DEVICES={args.local_device}"
        )

    if args.distributed and args.coordinator:
        raise UsageError(
            "--distributed: finds coordinator and processes itself; leave out "
            f"--coordinator={args.coordinator} or --distributed"
        )
    if args.coordinator:
        split_address(args.coordinator)
    if args.num_processes > 1 and not args.coordinator:
        raise UsageError(
            f"--num_processes={args.num_processes}: needs --coordinator=HOST:PORT of process 0"
        )
    if args.coordinator and args.num_processes == 1:
        raise UsageError(
            f"--coordinator={args.coordinator}: needs --num_processes=N, the processes of the job"
        )
    if not 0 <= args.process_id < args.num_processes:
        raise UsageError(
            f"--process_id={args.process_id}: expected 0 to {args.num_processes - 1}, because "
            f"--num_processes={args.num_processes}"
        )


def start_runtime(args: argparse.Namespace) -> None:
    """Sets allocator, fake devices, compiled programs and process group, in JAX's order.

    Call it before any array exists. Raises UsageError and PeerFailed.
    """
    check_runtime(args)
    keep_memory()
    environment.prepare()
    environment.keep_threads(args.cpu_devices)
    with tell_problems(job_flags(args), os.environ):
        environment.check_xla_flags()
    import jax

    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    compile_cache.keep_compiled(args.compilation_cache)
    if args.cpu_devices > 1 or args.num_processes > 1 or args.distributed:
        # CPU devices that talk to each other may run one step at a time. With more steps in the
        # queue, all threads can wait for devices whose own step has no thread left. That happened
        # to two processes of four devices on two busy cores.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if args.distributed or args.num_processes > 1:
        join_job(job_flags(args), os.environ)


def job_flags(args: argparse.Namespace) -> JobFlags:
    """What the parsed flags say about the job."""
    return JobFlags(**{name: getattr(args, name) for name in JobFlags._fields})


def leaving(line: str) -> Callable:
    """A handler of signals for when there is nothing to save.

    It prints `line` and ends this process with Stopped's code.
    """

    def leave(_, frame: FrameType | None) -> None:
        ignore_requests()
        os.write(2, f"gpt-jax: {line}\n".encode())
        # jaxlib turns a normal exit during its import into an ImportError, which would look like a
        # bug. In a job of several processes a normal exit would wait for the others.
        if is_importing(frame) or is_in_job():
            os._exit(Stopped.code)
        sys.exit(Stopped.code)

    return leave


def is_in_job() -> bool:
    """Whether this process has joined others. Imports nothing."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_importing(frame: FrameType | None) -> bool:
    """Whether `frame` runs for an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def end_on_request() -> None:
    """Lets SIGTERM end this process at once, for commands that have nothing to save.

    In a job of several processes JAX would take the signal and carry on. Call this after
    start_runtime.
    """
    signal.signal(signal.SIGTERM, leaving("stopped on request"))


def keep_memory() -> None:
    """Stops glibc from giving big buffers back to the kernel after every step.

    On a CPU the page faults of getting them anew cost about a third of a small step. Other systems
    and other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC.items():
            mallopt(parameter, value)
