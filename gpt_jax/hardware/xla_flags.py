"""XLA flags that mend a compiler for the whole process, and with which jaxlib each is needed.

What is merely faster travels with a compilation (xla_options.py). A fault that makes sums wrong
must not depend on who compiles. So the flags hold for every program of the process, also for
functions that nobody jits, and for the processes that it starts. `import gpt_jax` writes them
before JAX opens a device.
"""

import sys
from collections.abc import MutableMapping
from typing import NamedTuple

NAME = "XLA_FLAGS"

# Whether somebody imported JAX before `import gpt_jax`. Then it may have opened its devices, and
# read its flags, too early for ours.
JAX_CAME_FIRST = "jax" in sys.modules


class Flag(NamedTuple):
    """A flag of XLA and the versions of jaxlib that need it.

    Other versions may not know the name, and XLA ends a process that is given an unknown flag.
    """

    name: str
    value: str
    jaxlibs: tuple[str, ...]


# XLA hands parts of a CPU program to the library YNN. In these versions sums of products come back
# wrong (jax#39103) or crash (jax#39257, jax#40412). Single matmuls are right, and they are what
# YNN is good for: handing nothing over is 12 to 15 % slower.
YNN = Flag(
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    ("0.10.2", "0.11.0"),
)
FLAGS = (YNN,)


def add_xla_flags(environ: MutableMapping[str, str], jaxlib: str) -> str:
    """Adds the flags that this version of jaxlib needs to `environ`, and returns all that are set.

    A flag that is set already keeps its value. An `XLA_FLAGS` that names a file stays untouched.
    """
    given = environ.get(NAME, "")
    if given and not given.lstrip().startswith("-"):
        return given
    wanted = [flag for flag in FLAGS if jaxlib in flag.jaxlibs and flag.name not in given]
    if wanted:
        added = [f"--{flag.name}={flag.value}" for flag in wanted]
        environ[NAME] = " ".join([*given.split(), *added])
    return environ.get(NAME, "")
