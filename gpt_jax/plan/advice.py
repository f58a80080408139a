"""What would fit in place of a config that does not, and why nothing does."""

from dataclasses import replace
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.estimate import estimate_job
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.search import (
    CLOSE,
    MARGIN,
    Candidate,
    generate_fits,
    generate_meshes,
    list_overrides,
    rank_candidate,
    search_meshes,
    standing_bytes,
)
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.wording import format_size


class Advice(NamedTuple):
    """What to do about a config that cannot run or does not fit."""

    offers: list[Candidate]
    reason: str  # Why nothing would fit; "" if there are offers.


def give_advice(job: PlanJob, topology: Topology, refused: list[tuple[float, float]]) -> Advice:
    """Returns what would fit, after what the compiler refused (see lower_limit)."""
    offers = find_advice(job, topology, lower_limit(topology, refused))
    return Advice(offers, "" if offers else explain_nothing_fits(job, topology))


def lower_limit(topology: Topology, refused: list[tuple[float, float]]) -> float:
    """Returns the arithmetic's peak that can be trusted to fit after the compiler's refusals.

    `refused` has the peaks of each config, (by the arithmetic, by the compiler). The second is 0 if
    the compiler did not say it.
    """
    limits = [MARGIN * topology.chip.memory]
    for expected, peak in refused:
        limits.append(limits[0] * expected / peak if peak else CLOSE * expected)
    return min(limits)


def find_advice(
    job: PlanJob, topology: Topology, limit: float | None = None, count: int = 3
) -> list[Candidate]:
    """Returns what fits (see search_meshes) and is not the config itself.

    Those with the fewest changes to the config come first, and of these the fastest.
    """

    def count_changes(candidate: Candidate) -> int:
        return len(list_overrides(job.config, candidate.config))

    others = [one for one in search_meshes(job, topology, limit) if count_changes(one)]
    return sorted(others, key=lambda one: (count_changes(one), rank_candidate(one)))[:count]


def explain_nothing_fits(job: PlanJob, topology: Topology) -> str:
    """Returns why no mesh, remat policy or accumulation makes the job fit."""
    if not any(generate_fits(job, topology, float("inf"))):
        mesh = configs.Mesh(data=1, fsdp=-1, dcn_data=topology.slices)
        plain = job._replace(config=replace(job.config, mesh=mesh))
        problem = estimate_job(plain, topology).problems[0]
        return f"no mesh of {topology} runs it; with all devices on fsdp {problem}"

    meshes = generate_meshes(job.config, topology)
    least = min(standing_bytes(job, topology, mesh) for mesh in meshes)
    if least > MARGIN * topology.chip.memory:
        reason = "alone is too much; take more devices"
    else:
        reason = (
            "leaves too little for the smallest microbatch; "
            "lower config.train.seq_len or config.train.batch_size, or take more devices"
        )
    return (
        f"nothing fits {topology}, whose devices have {format_size(topology.chip.memory)}: "
        "the state and its gradients, cut over all of them, "
        f"are {format_size(least)} each, which {reason}"
    )
