"""What commands share: flags, config files, and the runtime (devices, processes, allocator)."""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from gpt_jax import config
from gpt_jax.commands import environment
from gpt_jax.commands.join import join
from gpt_jax.errors import Stopped, UsageError, complain
from gpt_jax.meeting import split_address

MOST_CPU_DEVICES = 1024  # each has threads of its own (environment.keep_threads)
LONGEST = 86400  # seconds to wait for another process; what takes longer, nobody is waiting for


class Flags(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors: one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message):
        raise UsageError(f"{message}; see {self.prog} --help")


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
        join(args)


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


def local_workdir(text: str) -> Path:
    """The folder that --workdir means. Raises UsageError for the address of an object store,
    which a Path would take for a folder of that name, on every machine its own."""
    if "://" in text:
        raise UsageError(
            f"--workdir={text}: object stores are not supported; mount a folder that all hosts share"
        )
    return Path(text)


@contextlib.contextmanager
def output():
    """For writing what a command is asked for: UsageError where standard output does not take
    it. `| head` is another matter: BrokenPipeError passes."""
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # else it is tried again at the end
        raise UsageError(
            f"standard output cannot be written ({error.strerror}); send it elsewhere"
        ) from None


def emit(text: str) -> None:
    """What a command is asked for, as a whole. Raises UsageError."""
    with output() as stream:
        print(text, file=stream, flush=True)


def make_say(stream) -> Callable[[str], None]:
    """Lines for people, from process 0 alone. A reader that has gone (`| head`), or a full disk,
    does not end what is being done."""
    import jax

    gone = jax.process_index() != 0

    def say(line: str) -> None:
        nonlocal gone
        if gone:
            return
        try:
            print(line, file=stream, flush=True)
        except OSError as error:
            gone = True
            if stream is sys.stdout:  # else Python complains about it at the end
                sys.stdout = open(os.devnull, "w")
                if not isinstance(error, BrokenPipeError):
                    complain(
                        f"standard output cannot be written ({error.strerror}): nothing more is said there"
                    )

    return say


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


def load_config(spec: str, overrides: list[str]) -> config.Config:
    """The Config of `path.py[:argument]` with `--config.section.key=value` overrides. Raises
    UsageError."""
    path, _, argument = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UsageError(
            f"--config={spec}: {'is a folder' if file.is_dir() else 'no such file'}"
            + (f"; there are {', '.join(near)}" if near else "")
        )
    if file.suffix != ".py":
        raise UsageError(
            f"--config={spec}: is no Python file; expected FILE.py, or FILE.py:VARIANT"
        )
    sys.path.insert(0, str(file.resolve().parent))  # a config may import its neighbours
    try:
        module_spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(module_spec)
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # standard output is the command's own, JSON even
            module_spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UsageError(f"--config={spec}: the file has no get_config()")
            made = module.get_config(argument) if argument else module.get_config()
        if not isinstance(made, ConfigDict):
            raise UsageError(
                f"--config={spec}: get_config() gives {type(made).__name__}, not a ConfigDict"
            )
        values = made.to_dict()
    except UsageError:
        raise
    except ValueError as error:  # how a config refuses its argument
        raise UsageError(f"--config={spec}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a file that is not a config does
        line = " ".join(str(error).split())
        raise UsageError(
            f"--config={spec}: cannot be read as a config: {type(error).__name__}: {line}"
        ) from None
    finally:
        sys.path.pop(0)
    for key, text in split_overrides(overrides):
        config.override(values, key, text)
    return config.from_dict(values)


def split_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """`["--config.a.b=1", "--config.c", "2"]` -> [("a.b", "1"), ("c", "2")]; anything else is a
    UsageError."""
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            raise UsageError(
                f"unknown argument {flag!r}; overrides look like --config.optim.learning_rate=3e-4"
            )
        key, equals, text = flag.removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"{flag}: needs a value, as in {flag}=…")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs
