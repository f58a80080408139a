"""Options of XLA's compilers by platform, each with its reason, and how a config changes them.

They go with one compilation (`jax.jit(compiler_options=…)`) and never through XLA_FLAGS, because
an unknown name there ends the process. Here it raises. The config's field FIELD changes them, and
`gpt-jax plan --option` adds to that field.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt_jax.errors import UsageError

FIELD = "config.compute.compiler_options"
# Collectives that run next to matmuls. Without these options libtpu 0.0.42 makes computing wait for
# every gather of a fsdp program on v5p and v6e. On v5e they change nothing.
TPU = {
    # A collective runs inside a fusion of what is computed meanwhile.
    "xla_tpu_enable_async_collective_fusion": True,
    # The gathers of weights do so too.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    # A gather may run over several fusions, because it outlasts one.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    # The tensor core goes on while the links work.
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
GPU = {
    # Gathers start early, and reductions end late.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # XLA's own pass would undo the remat policy that was chosen.
    "xla_disable_hlo_passes": "rematerialization",
    # The matmuls of cuBLASLt are faster on Hopper than Triton's.
    "xla_gpu_enable_triton_gemm": False,
}
DEFAULTS = {"tpu": TPU, "gpu": GPU}  # Options by `device.platform`; a CPU has none.
# More memory beside the matrix units lets a fusion hold larger tiles. Cores of v5e and v6e have 128
# MiB of it, and those of v5p and TPU7x have 64 (jax/_src/pallas/mosaic/tpu_info.py). The figures
# are the compiler's cycles (libtpu 0.0.42), and but for v6e's they stand in
# benchmarks/tpu_options.json. Only v6e's limit was tried on a whole step.
_LIMIT = "xla_tpu_scoped_vmem_limit_kib"
# A step of two layers of llama:8b on 256 chips takes 0.297 in place of 0.387 s.
V6E: dict[str, object] = {_LIMIT: 98304}
# A SwiGLU layer takes 91.4 in place of 115.2 ms, forward and backward. More adds nothing.
V5E: dict[str, object] = {_LIMIT: 49152}
# The same layer takes 39.1 in place of 47.2 ms. Half as much again gains 1 % more in its matmuls,
# and they compile for 2.5 times as long.
V5P: dict[str, object] = {_LIMIT: 32768}
# The same layer takes 17.4 in place of 22.0 ms. The limit leaves a quarter of the memory to others.
TPU7X: dict[str, object] = {_LIMIT: 49152}
# Options of a generation, by `device.device_kind`.
GENERATIONS = {
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU7x": TPU7X,
}
# How many times as long compiling takes with the options of GENERATIONS as without them. On v6e it
# is that step on a busy machine, 793 in place of 213 s. On others it is the layer's CPU time.
SLOWDOWNS = {
    "TPU v6 lite": 3.7,
    "TPU v6e": 3.7,
    "TPU v5 lite": 7,
    "TPU v5e": 7,
    "TPU v5": 2.4,
    "TPU v5p": 2.4,
    "TPU7x": 1.4,
}
# Words by which XLA's errors about options are known.
FAULT_WORDS = ("No such compile option", "While setting option", "nknown option")


def parse_options(texts: Sequence[str]) -> dict:
    """Parses `["name=true", "other=3"]` into `{"name": True, "other": 3}`; "name=" gives None.

    Raises UsageError for a text without a name or without `=`.
    """
    words = {"true": True, "false": False, "": None}
    options = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise UsageError(
                f"{FIELD} = {text!r}: expected NAME=VALUE, "
                "or NAME= to leave out one of gpt_jax/hardware/xla_options.py"
            )
        number = int(value) if value.lstrip("-").isdecimal() else value
        options[name] = words.get(value.lower(), number)
    return options


def choose_xla_options(platform: str, kind: str = "", texts: Sequence[str] = ()) -> dict:
    """Returns what a program for devices of this platform and kind is compiled with.

    These are DEFAULTS and GENERATIONS, changed by `texts`, which come from the config's field
    FIELD.
    """
    options = DEFAULTS.get(platform, {}) | GENERATIONS.get(kind, {}) | parse_options(texts)
    return {name: value for name, value in options.items() if value is not None}


def describe_xla_options(platform: str, kind: str, chosen: dict) -> str:
    """Returns a line for people. It says what the generation's options cost in compile time."""
    words = " ".join(f"{name}={value}" for name, value in chosen.items()) or "none"
    line = f"compiler options ({platform}): {words}"

    own = GENERATIONS.get(kind, {})
    if not own or any(chosen.get(name) != value for name, value in own.items()):
        return line
    names = ", ".join(own)
    return f"{line}; compiling takes about {SLOWDOWNS[kind]:g} times as long with {names}"


def find_option_fault(error: Exception) -> str:
    """Returns what is wrong with the options, in a line, or "" if `error` has another cause."""
    line = " ".join(str(error).split())
    if not any(words in line for words in FAULT_WORDS):
        return ""
    return f"{FIELD}: {line[:300]}; NAME= leaves an option of gpt_jax/hardware/xla_options.py out"


def check_xla_options(chosen: dict, mesh) -> None:
    """Compiles next to nothing with the options, in 0.1 s, before anything long is compiled.

    Raises UsageError if the installed compiler does not know an option or refuses its value. The
    message names the option.
    """
    if not chosen:
        return

    with jax.set_mesh(jax.sharding.Mesh(mesh.local_devices[:1], ("data",))):
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = jax.jit(jnp.negative, compiler_options=chosen).lower(scalar)
        try:
            lowered.compile()
        except Exception as error:
            line = find_option_fault(error)
            if line:
                raise UsageError(line) from None
            raise
