"""Flags that mend a compiler: which jaxlib gets them, and that sums are right with them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from gpt_jax.hardware.xla_flags import NAME, YNN, add_xla_flags

# The program of jax#39103. Its last value is 32,768 squared.
SUM = """
import jax
import jax.numpy as jnp
i = jnp.arange(32_769, dtype=jnp.float32)
rows = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
matrix = jnp.eye(3, dtype=jnp.float32)
value = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)[-1]
print(float(value))
"""
RIGHT = 32_768.0**2


def test_flags_go_to_the_versions_that_need_them_and_leave_what_is_set():
    text = f"--{YNN.name}={YNN.value}"

    def added(jaxlib, **environ):
        add_xla_flags(environ, jaxlib)
        return environ

    assert added("0.10.2") == {NAME: text}
    assert added("0.12.0.1") == added("0.10.1") == {}
    assert added("0.10.2", XLA_FLAGS="--a=1") == {NAME: f"--a=1 {text}"}
    assert added("0.10.2", XLA_FLAGS=f"--{YNN.name}=") == {NAME: f"--{YNN.name}="}
    assert added("0.10.2", XLA_FLAGS=text) == {NAME: text}  # a child process of ours
    assert added("0.10.2", XLA_FLAGS="flags.txt") == {NAME: "flags.txt"}


def run_sum(before: str) -> float:
    """Runs the program of jax#39103 in a process that has none of our flags."""
    environ = {name: value for name, value in os.environ.items() if name != NAME}
    done = subprocess.run(
        [sys.executable, "-c", before + SUM],
        env=environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_whoever_imports_the_package_gets_right_sums():
    assert run_sum("import gpt_jax\n") == RIGHT


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="the fault is that of jaxlib 0.10.2")
def test_the_fault_is_still_there_without_the_flag():
    """When the compiler is mended, this test fails, and the flag can go."""
    assert run_sum("") != RIGHT


def test_sums_are_right_in_the_processes_of_this_suite(capsys):
    exec(SUM, {})
    assert float(capsys.readouterr().out) == RIGHT


def test_a_sum_of_seven_dimensions_does_not_crash():
    """jax#40412: without the flag jaxlib 0.10.2 ends the process here."""
    shape = (3, 1, 2, 2, 8, 8, 8)
    a, b = (np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in (0, 1))
    ours = jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(a, b)
    np.testing.assert_allclose(ours, (a * b).sum(3), rtol=1e-5, atol=1e-6)
