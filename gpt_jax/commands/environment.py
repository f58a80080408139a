"""What JAX wants of the environment, written before it looks for devices (called by
flags.start_runtime)."""

import os
from collections.abc import MutableMapping

# libtpu, on a machine without a TPU, says in five lines of standard error that it found none,
# unless it is told of one.
NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
SKIP = "TPU_SKIP_MDS_QUERY"  # set by `import jax` where it sees no TPU on the bus


THREADS = 4  # for each fake device


def keep_threads(cpu_devices: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Threads enough for several fake CPU devices: XLA's pool has one a core, each collective of
    a device holds one until the others have come, and those may need one too to get there. On 2
    cores, 2 processes of 4 devices stood still for ever so, seen in their stacks. What is set
    already stays."""
    if cpu_devices > 1:
        environ.setdefault("PJRT_NPROC", str(max(THREADS * cpu_devices, os.cpu_count() or 1)))


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before the first device. What is set already stays: a GPU's memory by JAX's own names
    (of which it takes one only), and everything about TPUs."""
    if not {SKIP, *NO_TPU} & set(environ):
        import jax  # noqa: F401

        if SKIP in environ:
            environ.update(NO_TPU)
    from gpt_jax.hardware import GPU_FRACTION

    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(environ):
        environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_FRACTION)
