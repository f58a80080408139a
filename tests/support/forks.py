"""Processes that start without an interpreter and imports of their own.

`Popen` is subprocess.Popen for `python -m MODULE …` and `python -c CODE …`. A server has imported
jax and all of gpt_jax, and has opened no device. It forks every process, which then is a child of
the tests like any other: signals, groups, exit codes and pipes are those of subprocess.

A fork differs from a real start in three things. It has the imports and the hash seed of its
server, and its /proc/PID/cmdline is that of the server. Tests of those use subprocess.
"""

import ctypes
import gc
import importlib
import inspect
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUEST_BYTES = 2**17  # of arguments and environment in one message
# Variables that an interpreter or a library reads once, while it starts or is imported.
READ_AT_START = (
    "JAX_",
    "PYTHON",
    "LD_",
    "MALLOC_",
    "LANG",
    "LC_",
    "OPENBLAS_",
    "OMP_",
    "HF_",
    "MPL",
)
# PYTHONPATH is looked at by itself. `breakpoint()` reads the other when it is called.
NOT_READ_AT_START = ("PYTHONPATH", "PYTHONBREAKPOINT")
# What a run imports after its start.
IMPORTED_LATE = (
    "jax.experimental.multihost_utils",
    "jaxlib.mlir.dialects.stablehlo",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "orbax.checkpoint.experimental.v1",
)
# The child of a child goes to the nearest process that adopts; PR_SET_CHILD_SUBREAPER in prctl.h.
ADOPT = 36


# ---- the side of the tests ----


class Popen(subprocess.Popen):
    """subprocess.Popen whose process is forked. Takes [sys.executable, "-m" or "-c", …].

    An environment that the server cannot give takes a plain interpreter, with a warning.
    Raises ValueError for what only subprocess.Popen can do.
    """

    def _execute_child(self, *given):
        plain = super()._execute_child
        named = inspect.signature(plain).bind(*given).arguments
        refused = [
            name for name in ("preexec_fn", "pass_fds", "shell", "executable") if named[name]
        ]
        words = [os.fspath(word) for word in named["args"]]
        if refused or words[0] != sys.executable or words[1] not in ("-m", "-c"):
            raise ValueError(f"no fork can do this, use subprocess.Popen: {refused or words[:2]}")

        environ = dict(os.environ if named["env"] is None else named["env"])
        different = SERVER.differences(environ)
        if different:
            warnings.warn(f"a plain interpreter and no fork, for {different}", stacklevel=4)
            plain(*given)
            return

        request = dict(
            words=words[1:],
            environ=environ,
            cwd=os.fspath(named["cwd"] or os.getcwd()),
            session=named["start_new_session"],
            group=named["process_group"],
        )
        ends = [named[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [number if end == -1 else end for number, end in enumerate(ends)]
        self.pid = SERVER.fork(request, streams)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*[named[name] for name in pipes])


def run(words: list[str], **options) -> subprocess.CompletedProcess:
    """subprocess.run with its output captured, by a fork."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    with Popen(words, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


class Server:
    """The process that forks for this one. It starts at the first request, and ends with us."""

    def __init__(self):
        self.lock = threading.Lock()
        self.environ = os.environ | {"PYTHONPATH": str(ROOT)}
        self.line: socket.socket | None = None

    def differences(self, environ: dict[str, str]) -> list[str]:
        """Names of the variables that only a new interpreter would read."""
        names = {name for name in environ.keys() | self.environ.keys() if is_read_at_start(name)}
        found = sorted(name for name in names if environ.get(name) != self.environ.get(name))
        # Without a PYTHONPATH a process takes the installed package, which is the one in ROOT.
        first = environ.get("PYTHONPATH", "").split(os.pathsep)[0]
        return found if first in ("", str(ROOT)) else [*found, "PYTHONPATH"]

    def fork(self, request: dict, streams: list[int]) -> int:
        """The number of a new process, which is a child of this one."""
        with self.lock:
            if self.line is None:
                self.line = self.start()
            adopt(True)
            try:
                socket.send_fds(self.line, [pickle.dumps(request)], streams)
                answer = self.line.recv(64)
            finally:
                adopt(False)
        if not answer:
            raise RuntimeError("the server of tests/support/forks.py has ended")
        return int(answer)

    def start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=self.environ,
                cwd=ROOT,
            )
        return ours


def is_read_at_start(name: str) -> bool:
    return name.startswith(READ_AT_START) and name not in NOT_READ_AT_START


def adopt(wanted: bool) -> None:
    """Whether orphans among the descendants of this process become its children."""
    if ctypes.CDLL(None, use_errno=True).prctl(ADOPT, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


SERVER = Server()


# ---- the side of the server ----


def import_all() -> None:
    """Every module of gpt_jax, with what it imports."""
    import gpt_jax

    for module in pkgutil.walk_packages(gpt_jax.__path__, "gpt_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in IMPORTED_LATE:
        importlib.import_module(name)


def serve(line: socket.socket) -> tuple[dict, list[int]]:
    """Forks for every request. Returns in each new process, and nowhere else."""
    while True:
        message, streams, _, _ = socket.recv_fds(line, REQUEST_BYTES, 3)
        if not message:  # the tests have ended
            os._exit(0)
        ours, theirs = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                os.close(ours)
                os.close(theirs)
                line.close()
                return pickle.loads(message), streams
            os.write(theirs, str(child).encode())
            os._exit(0)

        os.close(theirs)
        for stream in streams:
            os.close(stream)
        child_number = os.read(ours, 64)
        os.close(ours)
        os.waitpid(middle, 0)  # from now on the child is the tests'
        line.send(child_number)


def become(request: dict, streams: list[int], paths: list[str], imported: dict, interrupt) -> None:
    """Gives this process what a new interpreter would have got.

    `imported` are the variables that the imports have set, and `interrupt` handles SIGINT.
    """
    if request["session"]:
        os.setsid()
    if request["group"] != -1:
        os.setpgid(0, request["group"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    signal.signal(signal.SIGINT, interrupt)

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(imported | request["environ"])
    time.tzset()
    tempfile.tempdir = None
    gpt_jax = sys.modules["gpt_jax"]
    jaxlib = sys.modules["jaxlib"]
    gpt_jax.XLA_FLAGS = gpt_jax.add_xla_flags(os.environ, jaxlib.__version__)

    way, _, *words = request["words"]
    first = request["cwd"] if way == "-m" else ""
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *more, *paths]
    sys.orig_argv = [sys.executable, *request["words"]]
    sys.argv = ["-m" if way == "-m" else "-c", *words]


def run_code(way: str, what: str) -> None:
    if way == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(what, "<string>", "exec"), main.__dict__)


def main() -> None:
    """The server. In each child this returns at the end of its code, as an interpreter does."""
    line = socket.socket(fileno=int(sys.argv[1]))
    paths = [path for path in sys.path[1:] if path != str(ROOT)]
    # Ctrl-C is for the tests and their processes. In the background a shell has it ignored.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = dict(os.environ)
    import_all()
    imported = {name: os.environ[name] for name in os.environ.keys() - before.keys()}
    imported.pop("XLA_FLAGS", None)  # which `become` makes anew
    gc.freeze()  # a collection in a child would copy every page
    request, streams = serve(line)
    become(request, streams, paths, imported, interrupt)
    run_code(*request["words"][:2])


if __name__ == "__main__":
    main()
