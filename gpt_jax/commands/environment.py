"""What JAX wants of the environment, written before it looks for devices."""

import os
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping

from gpt_jax.errors import UsageError, plain

# Without these libtpu says in five lines of standard error that it found no TPU.
NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
}
SKIP = "TPU_SKIP_MDS_QUERY"  # set by `import jax` where it sees no TPU on the bus
GPU_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

THREADS = 4  # for each fake device

XLA_FLAGS = "XLA_FLAGS"
# Variables that choose the devices.
DEVICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")
JAX_FOLDER = f"{os.sep}jax{os.sep}_src{os.sep}"
# What JAX advises at the end of its error. Our line has advice of its own.
ADVICE = re.compile(r"\s*\((set JAX_PLATFORMS|you may need to uninstall)[^)]*\)\s*$")


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


def check_xla_flags(environ: Mapping[str, str] = os.environ) -> None:
    """Raises UsageError for XLA_FLAGS that XLA does not take.

    XLA ends a process that has an unknown flag, with code 1 and a line of its own. So a copy of
    this process tries them first, unless they are those of `import gpt_jax` alone. With a device
    open they have been read, and a process with JAX's threads must not be copied.
    """
    import jaxlib.version
    from jax._src.xla_bridge import backends_are_initialized
    from jaxlib import xla_client

    from gpt_jax.hardware import add_xla_flags

    flags = environ.get(XLA_FLAGS, "")
    if flags == add_xla_flags({}, jaxlib.version.__version__) or backends_are_initialized():
        return

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        xla_client.CompileOptions()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as stream:
        said = stream.read().decode("utf-8", "replace")
    if os.waitpid(child, 0)[1]:
        reason = plain(said.rpartition("] ")[2]) or "XLA ended without a reason"
        raise UsageError(f"{XLA_FLAGS}={plain(flags)}: {reason}; correct it, or unset it")


def find_fault(error: Exception, environ: Mapping[str, str]) -> str | None:
    """A line for an error that comes of JAX's environment variables. None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if JAX_FOLDER in frame.filename]
    if not own:
        return None
    # JAX reads most variables while it is imported, and refuses what it cannot read.
    if isinstance(error, ValueError) and any(frame.name == "<module>" for frame in own):
        return describe_variable(error, environ)
    if isinstance(error, (RuntimeError, AssertionError)) and is_opening_devices(frames[-1]):
        return describe_platform(error, environ)
    return None


def is_opening_devices(frame: traceback.FrameSummary) -> bool:
    """Whether an error was raised where JAX looks for the devices of a platform."""
    return frame.filename.endswith(f"{JAX_FOLDER}xla_bridge.py")


def describe_variable(error: Exception, environ: Mapping[str, str]) -> str:
    """Which variable JAX cannot read, if its error or the value tells."""
    reason = plain(error)
    given = {name: value for name, value in environ.items() if name.startswith("JAX_")}
    named = {name: value for name, value in given.items() if name.lower() in reason.lower()}
    # An error of Python's int() has the value alone.
    same = {name: value for name, value in given.items() if repr(value) in reason}
    texts = [f"{name}={plain(value)}" for name, value in (named or same or given).items()]
    return f"{', '.join(texts)}: JAX cannot read it ({reason}); correct it, or unset it"


def describe_platform(error: Exception, environ: Mapping[str, str]) -> str:
    """Why there are no devices, with the variables that choose them."""
    reason = ADVICE.sub("", plain(error)) or "none was found"
    named = [f"{name}={plain(environ[name])}" for name in DEVICES if environ.get(name)]
    if named:
        return (
            f"{', '.join(named)}: there is no such device that JAX can open here ({reason}); "
            "unset it to take what is here, or set JAX_PLATFORMS=cpu"
        )
    return (
        f"JAX cannot open the devices of this machine ({reason}); "
        "JAX_PLATFORMS=cpu leaves all but the CPU out"
    )
