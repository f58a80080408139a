"""The runtime of a command: devices, processes, memory allocator and signals."""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from gpt_jax.cluster import JobFlags, join_job, split_address
from gpt_jax.commands import environment
from gpt_jax.errors import Stopped, UsageError

MOST_CPU_DEVICES = 1024  # each has threads of its own (environment.keep_threads)
LONGEST = 86400  # seconds to wait for another process; what takes longer, nobody is waiting for


def add_runtime_flags(flags: argparse.ArgumentParser) -> None:
    """How many devices and processes take part."""
    group = flags.add_argument_group("devices and processes")
    group.add_argument(
        "--cpu_devices",
        type=int,
        default=0,
        metavar="N",
        help="run on N fake CPU devices, to try a mesh without hardware; 0: the devices there are",
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
        help="a process that is silent for so long counts as gone; raise it where the network has gaps",
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


def check_runtime(args: argparse.Namespace) -> None:
    """Raises UsageError for runtime flags that make no sense, before anything is started."""
    if not 0 <= args.cpu_devices <= MOST_CPU_DEVICES:
        raise UsageError(f"--cpu_devices={args.cpu_devices}: expected 0 to {MOST_CPU_DEVICES}")
    if args.num_processes < 1:
        raise UsageError(f"--num_processes={args.num_processes}: expected 1 or more")
    if args.local_device is not None and args.local_device < 0:
        raise UsageError(f"--local_device={args.local_device}: expected 0 or more")
    if args.local_device is not None and args.num_processes == 1 and not args.distributed:
        raise UsageError(
            f"--local_device={args.local_device}: is for one process of several; which GPUs a single one sees "
            f"is said by CUDA_VISIBLE_DEVICES={args.local_device}"
        )
    for name in ("join_seconds", "heartbeat_seconds"):
        if not 1 <= getattr(args, name) <= LONGEST:
            raise UsageError(f"--{name}={getattr(args, name)}: expected 1 to {LONGEST}")
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
        raise UsageError(f"--process_id={args.process_id}: expected 0 to {args.num_processes - 1}")


def start_runtime(args: argparse.Namespace) -> None:
    """Allocator, fake devices and process group, in the order in which JAX wants them. Call
    before any array exists."""
    check_runtime(args)
    keep_memory()
    environment.prepare()
    environment.keep_threads(args.cpu_devices)
    import jax

    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.cpu_devices > 1 or args.num_processes > 1 or args.distributed:
        # Of CPU devices that talk to each other one step may be running: with the next ones behind
        # it, all threads can end up waiting for devices whose step has none (seen with 2 processes
        # of 4 devices on 2 busy cores).
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if args.distributed or args.num_processes > 1:
        join_job(job_flags(args), os.environ)


def job_flags(args: argparse.Namespace) -> JobFlags:
    """What the parsed flags say about the job."""
    return JobFlags(**{name: getattr(args, name) for name in JobFlags._fields})


def leaving(line: str) -> Callable:
    """A handler of signals that ends this process with Stopped's code and `line`, when there is
    nothing to save."""

    def leave(_, frame):
        os.write(2, f"gpt-jax: {line}\n".encode())
        if importing(
            frame
        ):  # jaxlib makes an ImportError of an exit, and that would be taken for a bug
            os._exit(Stopped.code)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            os._exit(Stopped.code)  # a normal exit would wait for the others
        sys.exit(Stopped.code)

    return leave


def importing(frame) -> bool:
    """Whether `frame` runs for an import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def end_on_request() -> None:
    """SIGTERM ends this process at once, for commands that have nothing to save: in a job of
    several JAX takes the signal, and goes on. Call after start_runtime."""
    signal.signal(signal.SIGTERM, leaving("stopped on request"))


def keep_memory() -> None:
    """Stops glibc from giving big buffers back to the kernel after every step: on CPU the page
    faults of getting them anew cost about a third of a small step. Elsewhere, and under other C
    libraries, nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX of malloc.h
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
            mallopt(parameter, value)
