"""The train step of a plan, compiled in a process of its own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gpt_jax.errors import UsageError, install_command

# What the compilers read from the environment when they are loaded. The last variable lets several
# plans run at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# platform -> (modules that must be installed, the package that brings them)
COMPILERS = {
    "tpu": (("libtpu",), "libtpu"),
    "gpu": (("jax_plugins.xla_cuda13", "nvidia"), "jax[cuda13]"),
}


def need_compiler(topology) -> None:
    """Raises UsageError if the compiler for a machine is not installed, or cannot describe it."""
    modules, package = COMPILERS[topology.chip.platform]
    missing = [name for name in modules if not is_installed(name)]
    if missing:
        raise UsageError(
            f"--compile: {topology.name} needs {missing[0]}, which is not installed: "
            f"{install_command(package)}"
        )
    if topology.name == "v4":
        raise UsageError(
            "--compile: libtpu describes v4 by cores, and runs use whole chips; leave --compile out"
        )


def is_installed(module: str) -> bool:
    """Whether a module can be imported. It is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # The package that it belongs to is missing, too.
        return False


def compile_outside(args, overrides: list[str]) -> dict:
    """Compiles a config with `gpt-jax plan --inside`, and returns what that process wrote.

    They need a process of their own, because they read their environment when they are loaded. If
    it ends early, its last words are the refusal. Raises UsageError if that process does.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "compiled.json"
        command = [
            sys.executable,
            "-m",
            "gpt_jax",
            "plan",
            f"--config={args.config}",
            f"--topology={args.topology}",
            f"--slices={args.slices}",
            "--compile",
            f"--inside={answer}",
            *overrides,
        ]
        if args.keep_hlo:
            command.append(f"--keep_hlo={args.keep_hlo}")
        returncode, errors = run_child(command, os.environ | ENVIRONMENT)
        if answer.exists():
            return json.loads(answer.read_text())

    lines = [line for line in errors.splitlines() if line.strip()]
    if returncode == UsageError.code:
        raise UsageError(lines[-1].removeprefix("gpt-jax: "))
    tail = " | ".join(lines[-3:])[-500:]
    refusal = f"the compiler's process ended with code {returncode}: {tail}"
    return {"seconds": 0, "peak": 0, "refusal": refusal}


def run_child(command: list[str], environ: Mapping[str, str]) -> tuple[int, str]:
    """(exit code, standard error) of a child process. It does not outlive a request to stop.

    A request that came inside Popen would find nothing to end yet, so it waits until Popen returns.
    """
    requests = []
    before = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    child = None
    try:
        child = subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        signal.signal(signal.SIGTERM, before)
        for number in requests:
            signal.raise_signal(number)
        _, errors = child.communicate()
    except BaseException:  # The handler of a request raises SystemExit.
        signal.signal(signal.SIGTERM, before)
        if child is not None:
            child.kill()
            child.wait()
        raise
    return child.returncode, errors
