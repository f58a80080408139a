"""Compiler options by platform, each with its reason. Pass them with a compilation (`compiler_options=`), never through
XLA_FLAGS: there an unknown name ends the process, here it raises.

`gpt-jax plan --compile` uses DEFAULTS of the topology's platform; `--option name=value` adds to them or replaces one.
"""

from gpt_jax.errors import UsageError

# Collectives next to matmuls. Without the first three, libtpu 0.0.42 compiles every gather of a fsdp program as one
# that computing waits for.
TPU = {
    "xla_tpu_enable_async_collective_fusion": True,  # a collective runs inside a fusion of what is computed meanwhile
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,  # gathers of weights too
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,  # over several fusions: a gather outlasts one
    "xla_tpu_overlap_compute_collective_tc": True,  # the tensor core goes on while the links work
    "xla_enable_async_all_gather": True,
}

GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,  # gathers start early, reductions end late
    "xla_disable_hlo_passes": "rematerialization",  # else XLA undoes the remat policy that was chosen
    "xla_gpu_enable_triton_gemm": False,  # cuBLASLt's matmuls are faster on Hopper
}

DEFAULTS = {"tpu": TPU, "gpu": GPU}


def parse(texts: list[str]) -> dict:
    """`["name=true", "other=3"]` -> {"name": True, "other": 3}; UsageError for one without a value."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--option={text}: expected NAME=VALUE")
        number = int(value) if value.lstrip("-").isdecimal() else value
        found[name] = {"true": True, "false": False}.get(value.lower(), number)
    return found
