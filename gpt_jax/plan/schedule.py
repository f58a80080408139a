"""The time of a step from a compiled program: the compiler's cycles, and our links for the rest."""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.model import KERNELS
from gpt_jax.plan.estimate import find_mfu
from gpt_jax.plan.experts import count_exchange_places, count_turns
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.links import find_link
from gpt_jax.plan.microbatch import Microbatch, split_microbatch
from gpt_jax.plan.roofline import (
    attention_seconds,
    compute_seconds,
    matmul_seconds,
    passes_seconds,
    update_seconds,
)
from gpt_jax.plan.topology import Topology


class Schedule(NamedTuple):
    """Seconds of one step."""

    computing: float  # The compiler's cycles where it writes them (TPU), else the arithmetic's.
    by_cycles: bool
    kernels: float  # Attention and (TPU) experts' grouped matmuls, which carry no cycles.
    hidden: float  # Collectives that run asynchronously.
    open: float  # Collectives that computing waits for.
    update: float  # The optimiser's by the arithmetic; 0 where the cycles have it.
    step: float
    mfu_full: float
    mfu_causal: float
    flops_ratio: float  # Matmul FLOPs of the program over those of the model.


def estimate_schedule(job: PlanJob, topology: Topology, kernel: str, program: dict) -> Schedule:
    """Returns the schedule of a program. `program` is a Program as a dictionary."""
    shape = configs.mesh_shape(job.config.mesh, topology.devices)
    across = configs.cross_slice(job.config.mesh)
    here = split_microbatch(job, shape)
    # Kernels skip the rows of buffers that nobody sent.
    grouped = program["grouped_flops"] / count_exchange_places(job.config.model, shape)

    attention = attention_seconds(job, topology, kernel, here)
    by_cycles = program["cycles"] > 0
    if by_cycles:
        computing = program["cycles"] / topology.chip.clock
        kernels = 0.0 if KERNELS[kernel].has_cycles else attention
        kernels += matmul_seconds(job, topology, grouped)
        update = 0.0
    else:
        computing = compute_seconds(job, topology, kernel, shape, here) - attention
        computing += passes_seconds(job, topology, kernel, shape, here)
        kernels = attention
        update = update_seconds(job, topology, shape)

    hidden = network_seconds(program, topology, shape, across, is_asynchronous=True)
    open_ = network_seconds(program, topology, shape, across, is_asynchronous=False)
    step = max(computing + kernels, hidden) + open_ + update
    mfu_full, mfu_causal = find_mfu(job, topology, step)
    return Schedule(
        computing=computing,
        by_cycles=by_cycles,
        kernels=kernels,
        hidden=hidden,
        open=open_,
        update=update,
        step=step,
        mfu_full=mfu_full,
        mfu_causal=mfu_causal,
        flops_ratio=_compare_flops(job, topology, kernel, shape, here, program, grouped),
    )


def network_seconds(
    program: dict,
    topology: Topology,
    shape: dict[str, int],
    across: dict[str, int],
    is_asynchronous: bool,
) -> float:
    """Returns the seconds of all collectives of one kind, one after the other.

    One over several axes goes at the speed of the slowest.
    """
    seconds = []
    for row in program["collectives"]:
        if row["asynchronous"] == is_asynchronous:
            speed = min(find_link(topology, shape, across, axis).speed for axis in row["axes"])
            seconds.append(row["bytes"] * row["calls"] / speed)
    return sum(seconds)


def _compare_flops(
    job: PlanJob,
    topology: Topology,
    kernel: str,
    shape: dict[str, int],
    here: Microbatch,
    program: dict,
    grouped: float,
) -> float:
    """Returns the matmul FLOPs of the program on one device over those of the model."""
    turns = count_turns(job, shape, here.tick_tokens, topology.chip.platform)
    flops = program["matmul_flops"] + program["turn_flops"] * turns + grouped

    train = job.config.train
    tokens = train.batch_size * train.seq_len / topology.devices
    # The program's FLOPs have none of the kernels that cannot be read.
    a_token = job.full_flops if KERNELS[kernel].has_cycles else 6 * job.matmul_params
    return flops / (tokens * a_token)
