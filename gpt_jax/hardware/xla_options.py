"""Options of XLA's compilers by platform, each with its reason, and how a config changes them
(floor 0, called by experiment, and so by `gpt-jax train` and `gpt-jax plan` alike).

They go with a compilation (`jax.jit(compiler_options=…)`), never through XLA_FLAGS: there an
unknown name ends the process, here it raises. `config.train.compiler_options` adds to them,
`gpt-jax plan --option` adds to that.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt_jax.errors import UsageError

FIELD = "config.train.compiler_options"
# Collectives next to matmuls. Without them libtpu 0.0.42 compiles every gather of a fsdp program
# for v5p and v6e as one that computing waits for (on v5e they change nothing).
TPU = {
    # a collective runs inside a fusion of what is computed meanwhile
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,  # gathers of weights too
    # over several fusions: a gather outlasts one
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,  # the tensor core goes on while the links work
    "xla_enable_async_all_gather": True,
}

GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,  # gathers start early, reductions end late
    # else XLA undoes the remat policy that was chosen
    "xla_disable_hlo_passes": "rematerialization",
    "xla_gpu_enable_triton_gemm": False,  # cuBLASLt's matmuls are faster on Hopper
}

DEFAULTS = {"tpu": TPU, "gpu": GPU}  # by `device.platform`; none on CPUs


def parse(texts: Sequence[str]) -> dict:
    """`["name=true", "other=3"]` -> {"name": True, "other": 3}; "name=" gives None. UsageError
    for one without a `=`."""
    found = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise UsageError(
                f"{FIELD} = {text!r}: expected NAME=VALUE, or NAME= to leave out one of gpt_jax/hardware/xla_options.py"
            )
        number = int(value) if value.lstrip("-").isdecimal() else value
        found[name] = {"true": True, "false": False, "": None}.get(value.lower(), number)
    return found


def choose_xla_options(platform: str, texts: Sequence[str] = ()) -> dict:
    """What a program for `platform` is compiled with: DEFAULTS, changed by `texts`
    (`config.train.compiler_options`)."""
    chosen = DEFAULTS.get(platform, {}) | parse(texts)
    return {name: value for name, value in chosen.items() if value is not None}


def describe_xla_options(platform: str, chosen: dict) -> str:
    """One line for people."""
    return f"compiler options ({platform}): {' '.join(f'{name}={value}' for name, value in chosen.items())}"


def find_option_fault(error: Exception) -> str:
    """What is wrong with the options, in a line, when that is why a compilation failed; else ""."""
    line = " ".join(str(error).split())
    if not any(
        words in line
        for words in ("No such compile option", "While setting option", "nknown option")
    ):
        return ""
    return f"{FIELD}: {line[:300]}; NAME= leaves an option of gpt_jax/hardware/xla_options.py out"


def check_xla_options(chosen: dict, mesh) -> None:
    """UsageError, naming it, for an option that the installed compiler does not know or that has
    a wrong value: found by compiling next to nothing (0.1 s), before anything long is."""
    if not chosen:
        return
    with jax.set_mesh(jax.sharding.Mesh(mesh.local_devices[:1], ("data",))):
        lowered = jax.jit(jnp.negative, compiler_options=chosen).lower(
            jax.ShapeDtypeStruct((), jnp.float32)
        )
        try:
            lowered.compile()
        except Exception as error:
            if line := find_option_fault(error):
                raise UsageError(line) from None
            raise
