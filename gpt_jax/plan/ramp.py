"""A run whose batch size changes is planned at the size that needs most memory."""

from dataclasses import replace

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.plan.advice import Advice
from gpt_jax.plan.estimate import estimate_job, find_problems
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.search import MARGIN, Candidate
from gpt_jax.plan.topology import Topology
from gpt_jax.run import format_count


def pick_largest(job: PlanJob, topology: Topology) -> PlanJob:
    """Returns the job at the batch size of its ramp that needs most memory of a device.

    A job that cannot run stays as it is, and its problems name all of its batch sizes.
    """
    config = job.config
    shape, problems = find_problems(config, topology.devices)
    if not config.train.batch_ramp or shape is None or problems:
        return job

    def find_peak(one: PlanJob) -> float:
        return estimate_job(one, topology).memory.peak

    levels = configs.list_levels(config.train)
    return max(
        (job._replace(config=replace(config, train=train)) for train in levels), key=find_peak
    )


def describe_ramp(asked: configs.Train, planned: configs.Train) -> list[str]:
    """Returns a line about the batch size that is planned, if `asked` has several."""
    if not asked.batch_ramp:
        return []
    count = len({train.batch_size for train in configs.list_levels(asked)})
    return [
        f"config.train.batch_ramp: {count} batch sizes, each a program of its own; what follows is "
        f"of the one that needs most memory, {planned.batch_size:,} rows in "
        f"{format_count(planned.accumulate, 'microbatch')}. Its accumulate stands in the ramp"
    ]


def put_ramp_back(advice: Advice, asked: PlanJob, topology: Topology) -> Advice:
    """Returns the advice for one batch size as advice for the ramp of `asked`.

    An offer stays if all batch sizes fit with it.
    """
    if not asked.config.train.batch_ramp or not advice.offers:
        return advice

    offers = [
        offer._replace(config=_put_back(asked.config.train, offer.config))
        for offer in advice.offers
    ]
    offers = [offer for offer in offers if _fits_at_all_sizes(offer, asked, topology)]
    reason = ""
    if not offers:
        reason = (
            "what helps the batch size that needs most memory does not help all those of "
            "config.train.batch_ramp; plan each alone, with --config.train.batch_ramp=()"
        )
    return Advice(offers, reason)


def _put_back(asked: configs.Train, offer: configs.Config) -> configs.Config:
    """Returns `offer`, which has one batch size, with all those of `asked`.

    The others get as many microbatches as keep them at the rows that a microbatch has in `offer`.
    """
    most = offer.train.batch_size // offer.train.accumulate

    def split(size: int, accumulate: int) -> int:
        if size == offer.train.batch_size:
            return offer.train.accumulate
        while size % accumulate or size // accumulate > most:
            accumulate += 1
        return accumulate

    train = replace(
        offer.train,
        batch_size=asked.batch_size,
        accumulate=split(asked.batch_size, asked.accumulate),
        batch_ramp=tuple(
            (token, size, split(size, accumulate)) for token, size, accumulate in asked.batch_ramp
        ),
    )
    return replace(offer, train=train)


def _fits_at_all_sizes(offer: Candidate, asked: PlanJob, topology: Topology) -> bool:
    """Returns whether each batch size of an offer divides over its mesh and fits the memory."""
    _, problems = find_problems(offer.config, topology.devices)
    if problems:
        return False
    largest = pick_largest(asked._replace(config=offer.config), topology)
    peak = estimate_job(largest, topology).memory.peak
    # The offer's own peak may be all that fits after a refusal of the compiler.
    return peak <= max(offer.estimate.memory.peak, MARGIN * topology.chip.memory)


def refuse_search(train: configs.Train) -> None:
    """Raises UsageError for a ramp, because a search chooses microbatches for one batch size."""
    if not train.batch_ramp:
        return
    largest = max(one.batch_size for one in configs.list_levels(train))
    raise UsageError(
        f"config.train.batch_ramp = {train.batch_ramp}: --search takes one batch size; search the "
        f"largest with --config.train.batch_ramp=() --config.train.batch_size={largest}"
    )
