"""Eight fake CPU devices in every test process, and one cache of compiled programs for the session.

The environment is written before jax is imported. Processes that tests start inherit it, so that
one loads what another has compiled. Under pytest-xdist the controller makes the folder, and its
workers inherit it too.
"""

import gc
import math
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jaxlib
import pytest

from gpt_jax.commands.environment import keep_threads
from gpt_jax.sharding.mesh import make_mesh

OWNER = "PYTEST_XDIST_WORKER" not in os.environ
# Tiny programs run for milliseconds and compile for seconds. LLVM's optimiser costs more than half
# of that, and the fusion emitters of jaxlib 0.10 and 0.11 a third of the rest. jaxlib 0.12 has no
# others, and ends a process that asks for them. DEFAULT_COMPILER=1 leaves XLA as users have it.
FAST_COMPILER = ["--xla_backend_optimization_level=0"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 12):
    FAST_COMPILER.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("DEFAULT_COMPILER"):
    FAST_COMPILER = []

if OWNER:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FAST_COMPILER])

# As the commands do where CPU devices talk to each other (commands/runtime.py). With one thread a
# device all threads can end up waiting in different collectives, for ever. Nothing of this stays in
# the environment, because a process that a test starts chooses its own numbers.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_cpu_enable_async_dispatch", False)
IS_SET = "PJRT_NPROC" in os.environ
keep_threads(8)
jax.devices()
if not IS_SET:
    del os.environ["PJRT_NPROC"]


def pytest_unconfigure(config):
    if OWNER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# Linux gives a process 65,530 mappings by default (vm.max_map_count), and LLVM takes three for each
# function that it compiles. A process without any left crashes in the middle of a test.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops the compiled programs of the modules before, once they hold many mappings."""
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def mesh():
    """A function that makes meshes of the first devices: `with jax.set_mesh(mesh(2, 2, 2)):`.

    The sizes are those of data, fsdp and tensor, and of further axes by name.
    """

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1, **others: int):
        shape = {"data": data, "fsdp": fsdp, "tensor": tensor} | others
        return make_mesh(shape, jax.devices()[: math.prod(shape.values())])

    return make
