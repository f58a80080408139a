"""A step's time and memory by arithmetic, what bounds it, and whether it fits.

A step takes max(matmuls + passes over memory, hidden flows) + open flows + update. Hidden flows run
behind matmuls, open ones do not. Flows over one axis share its links, and other axes have their
own.
"""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.hardware import mfu
from gpt_jax.model import choose_kernel, make_problem
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.links import Link, find_link
from gpt_jax.plan.memory import Memory, estimate_memory
from gpt_jax.plan.microbatch import split_microbatch
from gpt_jax.plan.roofline import compute_seconds, passes_seconds, update_seconds
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.traffic import Flow, list_flows


class Estimate(NamedTuple):
    """Seconds of one step by term, and what follows from them."""

    kernel: str
    reason: str  # Why this attention kernel was chosen.
    shape: dict[str, int]  # Sizes of the mesh's axes.
    memory: Memory
    matmuls: float
    passes: float
    hidden: dict[str, float]  # Seconds of hidden flows by axis.
    open: dict[str, float]  # Seconds of open flows by axis.
    update: float
    bubble: float  # The part of a pipeline's ticks in which a stage idles.
    flows: tuple[tuple[Flow, Link], ...]
    step: float
    bound: str
    mfu_full: float
    mfu_causal: float
    fits: bool
    problems: tuple[str, ...]  # Why it cannot run.


def find_problems(config: configs.Config, devices: int) -> tuple[dict[str, int] | None, list[str]]:
    """Returns the mesh's axis sizes and every disagreement of the config's fields on it.

    The sizes are None if no mesh has so many devices.
    """
    try:
        shape = configs.shape_on(config, devices)
    except UsageError as error:
        return None, [str(error)]
    return shape, configs.problems(config, shape)


def choose_plan_kernel(
    config: configs.Config, topology: Topology, shape: dict[str, int]
) -> tuple[str, str]:
    """Returns (attention kernel, why), as a run on this machine would choose.

    Raises UsageError if no kernel can do it, or if it cannot take a row length of the ramp.
    """
    problem = make_problem(
        config.model,
        config.compute.dtype,
        config.train.seq_len,
        topology.chip.platform,
        context=shape["context"],
        packed=config.data.document_mask,
    )
    return choose_kernel(config.compute.kernel, problem, config.train.length_ramp)


def estimate_job(job: PlanJob, topology: Topology) -> Estimate:
    """Returns everything about `job` on `topology`.

    Raises UsageError only if the config has no mesh of so many devices.
    """
    config = job.config
    shape, problems = find_problems(config, topology.devices)
    if shape is None:
        raise UsageError(problems[0])

    problems = [*_check_slices(config, topology), *problems]
    try:
        kernel, reason = choose_plan_kernel(config, topology, shape)
    except UsageError as error:
        kernel = "reference"
        reason = "none can"
        problems = [*problems, str(error)]
    problems = [*problems, *_check_experts(config, topology)]

    here = split_microbatch(job, shape)
    flows = _route_flows(job, topology, shape)
    hidden = _sum_flows(flows, is_hidden=True)
    open_ = _sum_flows(flows, is_hidden=False)

    matmuls = compute_seconds(job, topology, kernel, shape, here)
    passes = passes_seconds(job, topology, kernel, shape, here)
    update = update_seconds(job, topology, shape)
    step = max(matmuls + passes, max(hidden.values(), default=0.0)) + sum(open_.values()) + update

    memory = estimate_memory(job, shape, kernel, topology.chip.platform)
    mfu_full, mfu_causal = find_mfu(job, topology, step)
    return Estimate(
        kernel=kernel,
        reason=reason,
        shape=shape,
        memory=memory,
        matmuls=matmuls,
        passes=passes,
        hidden=hidden,
        open=open_,
        update=update,
        bubble=(shape["pipeline"] - 1) / here.ticks,
        flows=tuple(flows),
        step=step,
        bound=_find_bound(matmuls, passes + update, hidden, open_),
        mfu_full=mfu_full,
        mfu_causal=mfu_causal,
        fits=memory.peak <= topology.chip.memory,
        problems=tuple(problems),
    )


def _check_experts(config: configs.Config, topology: Topology) -> list[str]:
    """Returns why the machine does not have the matmul of experts that the config asks for."""
    chip = topology.chip
    habits = configs.find_habits(chip.platform, chip.kind)
    try:
        configs.choose_expert_matmul(config.compute.expert_matmul, habits, chip.kind)
    except UsageError as error:
        return [str(error)]
    return []


def _check_slices(config: configs.Config, topology: Topology) -> list[str]:
    """Returns why the mesh does not lie over the slices of a TPU. Nothing is wrong elsewhere."""
    if topology.chip.platform != "tpu":
        return []
    problem = configs.slices_problem(configs.cross_slice(config.mesh), topology.slices)
    return [problem] if problem else []


def _route_flows(
    job: PlanJob, topology: Topology, shape: dict[str, int]
) -> list[tuple[Flow, Link]]:
    """Returns what the devices send each other, with the link that it takes."""
    chip = topology.chip
    is_padded = not configs.find_habits(chip.platform, chip.kind).ragged_exchange
    across = configs.cross_slice(job.config.mesh)
    return [
        (flow, find_link(topology, shape, across, flow.axis))
        for flow in list_flows(job, shape, chip.platform, is_padded)
    ]


def _sum_flows(flows: list[tuple[Flow, Link]], is_hidden: bool) -> dict[str, float]:
    """Returns the seconds of flows by axis, of the axes that have any."""
    seconds = {}
    for axis in configs.AXES:
        total = sum(
            flow.bytes / link.speed
            for flow, link in flows
            if flow.axis == axis and flow.hidden == is_hidden
        )
        if total:
            seconds[axis] = total
    return seconds


def _find_bound(
    matmuls: float, memory: float, hidden: dict[str, float], open_: dict[str, float]
) -> str:
    """Returns the name of the largest term."""
    terms = {"matmuls": matmuls, "memory bandwidth": memory}
    for axis in {*hidden, *open_}:
        terms[f"the links of axis {axis}"] = hidden.get(axis, 0) + open_.get(axis, 0)
    return max(terms, key=lambda name: terms[name])


def find_mfu(job: PlanJob, topology: Topology, step: float) -> tuple[float, float]:
    """Returns the MFU of a step of so many seconds, (full attention map, causal)."""
    tokens = job.config.train.batch_size * job.config.train.seq_len / step
    peak = topology.peak * topology.devices
    return mfu(job.full_flops, tokens, peak), mfu(job.causal_flops, tokens, peak)
