"""What JAX wants of the environment, written before it looks for devices."""

import os
import sys
from collections.abc import MutableMapping

# Without these libtpu says in five lines of standard error that it found no TPU.
NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
SKIP = "TPU_SKIP_MDS_QUERY"  # set by `import jax` where it sees no TPU on the bus
GPU_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

THREADS = 4  # for each fake device


def keep_threads(cpu_devices: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets enough threads for several fake CPU devices. A number that is set already stays.

    XLA's pool has one thread for each core. A collective holds one for each device until all
    devices have come, and the others may need a thread to get there. So two processes of four
    devices on two cores stood still for ever, as their stacks showed.
    """
    if cpu_devices > 1:
        environ.setdefault("PJRT_NPROC", str(max(THREADS * cpu_devices, os.cpu_count() or 1)))


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what JAX reads at its start. Call it before the first device.

    Variables that are set already stay. For a GPU's memory that is either of JAX's two names,
    because JAX takes only one of them.
    """
    # `import jax` sets SKIP too, so it tells of the user only before that import.
    is_users = SKIP in environ and "jax" not in sys.modules
    if not is_users and not set(NO_TPU) & set(environ):
        import jax  # noqa: F401 (the import sets SKIP)

        if SKIP in environ:
            environ.update(NO_TPU)

    from gpt_jax.hardware import GPU_FRACTION

    if not set(GPU_MEMORY) & set(environ):
        environ[GPU_MEMORY[0]] = str(GPU_FRACTION)
