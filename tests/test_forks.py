"""What a forked process of the tests is and gets: the same as from subprocess."""

import json
import os
import signal
import subprocess
import sys

import forks
import pytest

# What a process can see of itself, a few imports later.
LOOK = """
import json, os, signal, sys, tempfile
import gpt_jax, jax
from jax._src import xla_bridge
print(json.dumps({
    "argv": sys.argv,
    "orig_argv": sys.orig_argv[1:],
    "path": sys.path,
    "main": [__name__, __spec__ is None, sys.modules["__main__"].__dict__ is globals()],
    "cwd": os.getcwd(),
    "tmp": tempfile.gettempdir(),
    "environ": dict(os.environ),
    "flags": gpt_jax.XLA_FLAGS,
    "leader": [os.getpid() == os.getpgrp(), os.getpid() == os.getsid(0)],
    "signals": {number.name: str(signal.getsignal(number)) for number in signal.valid_signals()
                if isinstance(number, signal.Signals) and number.name[:5] != "SIGRT"},
    "settings": [jax.config.jax_platforms, jax.config.jax_compilation_cache_dir],
    "devices": len(xla_bridge._backends),
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
    "streams": [[file.encoding, file.errors, file.line_buffering, file.isatty()]
                for file in (sys.stdin, sys.stdout, sys.stderr)],
    "said": sys.stdin.read(),
}))
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{forks.ROOT}:{forks.ROOT / 'tests'}"} | more


@pytest.mark.parametrize("session", [False, True])
def test_a_fork_sees_what_a_new_interpreter_sees(tmp_path, session):
    seen = []
    for start in (forks.Popen, subprocess.Popen):
        with start(
            [*python(LOOK), "--a=1", ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(TMPDIR=str(tmp_path), MINE="1", XLA_FLAGS="--xla_x=1"),
            start_new_session=session,
        ) as process:
            seen.append(json.loads(process.communicate("hello")[0]))
    fork, real = seen
    assert fork["environ"] == real["environ"]
    assert fork == real
    assert fork["leader"] == [session, session] and fork["devices"] == 0


@pytest.mark.parametrize(
    "code, ended",
    [
        ("", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('reason')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(9)", 9),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import atexit, os; atexit.register(os._exit, 5)", 5),
    ],
)
def test_ends_are_those_of_an_interpreter(code, ended):
    assert forks.run(python(code)).returncode == ended
    assert subprocess.run(python(code), capture_output=True).returncode == ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_signals_reach_a_fork(number):
    code = "import time; print(1, flush=True); time.sleep(600)"
    with forks.Popen(python(code), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait() == -number
    assert not os.path.exists(f"/proc/{process.pid}")


def test_a_module_is_main():
    done = forks.run([sys.executable, "-m", "gpt_jax", "--help"], env=environment())
    assert done.stdout.startswith("usage: gpt-jax <command>") and done.stderr == ""
    assert forks.run([sys.executable, "-m", "gpt_jax", "no"], env=environment()).returncode == 2


def test_what_the_server_cannot_give_takes_an_interpreter():
    code = "import jax; print(jax.config.jax_default_matmul_precision)"
    with pytest.warns(UserWarning, match="a plain interpreter.*JAX_DEFAULT_MATMUL"):
        done = forks.run(python(code), env=environment(JAX_DEFAULT_MATMUL_PRECISION="highest"))
    assert (done.returncode, done.stdout) == (0, "highest\n")
    with pytest.raises(ValueError, match=r"no fork can do this, .*preexec_fn"):
        forks.Popen(python(""), preexec_fn=os.getpid)
