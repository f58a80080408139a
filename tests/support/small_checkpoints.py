"""Small checkpoints, saved and compared here or in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config
from gpt_jax.train import restore_checkpoint
from gpt_jax.train.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[2]
POLICY = config.Checkpoint(every_steps=10, keep_last=3)


def abstract(tree):
    """The shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b) -> bool:
    """Whether structure, dtypes, shapes and bytes are equal.

    A NaN equals itself, and -0 is not 0.
    """

    def bits(leaf):
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    )


def small(step: int):
    """(params, train) that tell their step."""
    return (
        {"blocks": {"0": {"kernel": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + step}}},
        {"step": jnp.int32(step), "mu": jnp.full((4,), step, jnp.bfloat16)},
    )


def save_all(directory, steps, policy=POLICY, metrics=lambda step: {}):
    """Saves the `small` trees of all `steps`."""
    saver = checkpoints.open_checkpoints(directory, policy, report=lambda line: None)
    for step in steps:
        assert saver.save(step, *small(step), {"note": f"step {step}"}, metrics(step))
        saver.wait()
    saver.close()


def restored(directory, step):
    """(params, train) of a step."""
    out = restore_checkpoint(
        directory, step, dict(zip(("params", "train"), map(abstract, small(step)), strict=False))
    )
    return out["params"], out["train"]


def files_of(folder):
    """The names of all files below a folder, in order."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def cut(path):
    """Takes the last byte from a file."""
    path.write_bytes(path.read_bytes()[:-1])


CHILD = """
import errno, os, sys, threading, time
from pathlib import Path
sys.path[:0] = {folders!r}
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
import numpy as np, jax.numpy as jnp
from gpt_jax import config
from gpt_jax.errors import NoCheckpoint, SaveFailed
from gpt_jax.train import restore_checkpoint
from gpt_jax.train.checkpoint import checkpoints, manifest
from gpt_jax.train.checkpoint.policy import to_keep
from small_checkpoints import *
directory = {directory!r}
"""


def child(directory, body, devices=1):
    """Runs `body` in a process of its own. It sees the names of this file."""
    head = CHILD.format(
        folders=[str(ROOT / name) for name in ("", "tests/support")],
        devices=devices,
        directory=str(directory),
    )
    return forks.Popen(
        [sys.executable, "-c", head + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(*processes, code=0):
    """Waits for processes that must end with `code`."""
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == code, output[-3000:]
