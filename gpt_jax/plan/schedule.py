"""The time of a step from a compiled program: the compiler's cycles, and our link model for its
collectives (called by commands/plan.py)."""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.hardware import mfu
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.memory import local, room, turns
from gpt_jax.plan.roofline import (
    attention_seconds,
    compute_seconds,
    matmul_seconds,
    passes_seconds,
    update_seconds,
)
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.traffic import link

KERNELS = (
    "splash",
    "cudnn",
)  # attention kernels that carry no cycles, and whose FLOPs cannot be read


class Schedule(NamedTuple):
    """Seconds of one step. `computing`: the compiler's cycles where it writes them (TPU), else
    the arithmetic's; `kernels`: what carries no estimate, attention's and (TPU) experts' grouped
    matmuls; `hidden`: collectives that run asynchronously; `open`: those that do not; `update`:
    the optimiser's by the arithmetic, 0 where the cycles have it."""

    computing: float
    by_cycles: bool
    kernels: float
    hidden: float
    open: float
    update: float
    step: float
    mfu_full: float
    mfu_causal: float
    flops_ratio: float  # matmuls of the program over those of the model, in FLOPs


def network_seconds(
    program: dict, topology: Topology, shape: dict, across: dict, asynchronous: bool
) -> float:
    """Of all collectives of one kind, one after the other. One over several axes goes at the
    speed of the slowest."""
    return sum(
        row["bytes"]
        * row["calls"]
        / min(link(topology, shape, across, axis).speed for axis in row["axes"])
        for row in program["collectives"]
        if row["asynchronous"] == asynchronous
    )


def estimate_schedule(job: PlanJob, topology: Topology, kernel: str, program: dict) -> Schedule:
    """`program`: program.Program as a dict."""
    config = job.config
    shape, across = (
        configs.mesh_shape(config.mesh, topology.devices),
        configs.cross_slice(config.mesh),
    )
    here, by_cycles = local(job, shape), program["cycles"] > 0
    attention = attention_seconds(job, topology, kernel, here)
    repeat = turns(job, shape, here.tick_tokens, topology.chip.platform)
    if by_cycles:
        computing = program["cycles"] / topology.chip.clock
    else:
        computing = compute_seconds(job, topology, kernel, shape, here) - attention
        computing += passes_seconds(job, topology, kernel, shape, here)
    grouped = program["grouped_flops"] / room(
        config.model, shape
    )  # kernels skip the rows of buffers that nobody sent
    kernels = attention if kernel in KERNELS or not by_cycles else 0.0
    kernels += matmul_seconds(job, topology, grouped) if by_cycles else 0.0
    hidden, plain = (
        network_seconds(program, topology, shape, across, kind) for kind in (True, False)
    )
    update = 0.0 if by_cycles else update_seconds(job, topology, shape)
    step = max(computing + kernels, hidden) + plain + update
    tokens = config.train.batch_size * config.train.seq_len / step
    model = (
        config.train.batch_size
        * config.train.seq_len
        / topology.devices
        * (6 * job.matmul_params if kernel in KERNELS else job.full_flops)
    )
    flops = program["matmul_flops"] + program["turn_flops"] * repeat + grouped
    return Schedule(
        computing,
        by_cycles,
        kernels,
        hidden,
        plain,
        update,
        step,
        mfu(job.full_flops, tokens, topology.peak * topology.devices),
        mfu(job.causal_flops, tokens, topology.peak * topology.devices),
        flops / model,
    )
