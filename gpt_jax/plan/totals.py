"""What a report adds to an estimate: FLOPs of a step, bytes by remat, and what nothing counts."""

from dataclasses import replace

from gpt_jax import config as configs
from gpt_jax.plan.estimate import Estimate
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.memory import estimate_memory
from gpt_jax.plan.search import REMATS
from gpt_jax.plan.topology import Topology
from gpt_jax.run import describe_fp8


def step_flops(job: PlanJob) -> tuple[int, int]:
    """Returns the model's FLOPs of a step on all devices, (full attention map, causal)."""
    tokens = job.config.train.batch_size * job.config.train.seq_len
    return job.full_flops * tokens, job.causal_flops * tokens


def remat_bytes(job: PlanJob, topology: Topology, estimate: Estimate) -> dict[str, float]:
    """Returns the bytes of activations on a device under each policy that a search tries.

    Names that the config keeps are one more.
    """
    activations = {}
    if job.config.compute.remat == "names":
        activations["names"] = estimate.memory.activations
    for remat in REMATS:
        compute = configs.set_remat(job.config.compute, remat)
        changed = job._replace(config=replace(job.config, compute=compute))
        memory = estimate_memory(changed, estimate.shape, estimate.kernel, topology.chip.platform)
        activations[remat] = memory.activations
    return activations


def list_uncounted(config: configs.Config, topology: Topology) -> list[str]:
    """Returns what neither the arithmetic nor the compiler counts of this config."""
    lines = describe_fp8(config, topology.chip.platform, topology.chip.kind)
    if lines:
        rate = "the peak of fp8" if topology.fp8_peak else f"the peak of {config.compute.dtype}"
        lines.append(
            f"config.compute.matmul_dtype = 'fp8': its matmuls are counted at {rate}; memory is "
            f"that of {config.compute.dtype}"
        )
    fields = {
        "compute.remat = 'offload'": config.compute.remat == "offload",
        f"compute.remat_offload = {config.compute.remat_offload!r}": config.compute.remat_offload,
        "optim.state_memory = 'host'": config.optim.state_memory == "host",
    }
    lines += [
        f"config.{field}: its copies to the host's memory and back are not in the step's time"
        for field, is_used in fields.items()
        if is_used
    ]
    return lines
