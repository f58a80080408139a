"""The train step of a plan, compiled in a process of its own (called by plan)."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from gpt_jax.errors import UsageError

# What the compilers want of the environment, before they are loaded. The last lets several plans
# run at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# platform -> (modules that must be there, the extra that brings them)
COMPILERS = {
    "tpu": (("libtpu",), "plan"),
    "gpu": (("jax_plugins.xla_cuda13", "nvidia"), "plan-gpu"),
}


def need_compiler(topology) -> None:
    """UsageError when the compiler for this hardware is not installed, or cannot describe it."""
    modules, extra = COMPILERS[topology.chip.platform]
    missing = [name for name in modules if not _there(name)]
    if missing:
        raise UsageError(
            f"--compile: {topology.name} needs {missing[0]}, which is not installed: "
            f"pip install 'gpt_jax[{extra}]'"
        )
    if topology.name == "v4":
        raise UsageError(
            "--compile: libtpu describes v4 by cores, and runs use whole chips; leave --compile out"
        )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def compile_outside(args, rest: list[str]) -> dict:
    """compile_here in a process of its own: the compilers read their environment when they are
    loaded."""
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
            *([f"--keep_hlo={args.keep_hlo}"] if args.keep_hlo else []),
            *rest,
        ]
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, errors="replace"
        )
        if answer.exists():
            return json.loads(answer.read_text())
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == UsageError.code:
        raise UsageError(said[-1].removeprefix("gpt-jax: "))
    tail = " | ".join(said[-3:])
    return {
        "seconds": 0,
        "peak": 0,
        "refusal": f"the compiler's process ended with code {done.returncode}: {tail[-500:]}",
    }


def compile_here(config, topology, args) -> dict:
    """plan.compiled.Compiled of the config, as a dict. UsageError for what cannot run."""
    from gpt_jax.plan import choose_plan_kernel, compile_step, find_problems, resolve_vocab

    config = resolve_vocab(config)
    shape, found = find_problems(config, topology.devices)
    if found:
        raise UsageError(found[0])
    kernel, _ = choose_plan_kernel(config, topology, shape)
    keep = Path(args.keep_hlo).write_text if args.keep_hlo else None
    return asdict(compile_step(config, topology, kernel, keep))
