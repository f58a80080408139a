"""A run whose batch shape changes is planned at the shape that needs most memory."""

import math
from dataclasses import replace

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.plan.advice import Advice
from gpt_jax.plan.estimate import estimate_job, find_problems
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.search import MARGIN, Candidate
from gpt_jax.plan.topology import Topology
from gpt_jax.run import format_count, token_flops


def pick_largest(job: PlanJob, topology: Topology) -> PlanJob:
    """Returns the job at the batch shape of its ramps that needs most memory of a device.

    Of shapes that need as much it is the one with the longest rows. A job that cannot run stays as
    it is, and its problems name all of its batch shapes.
    """
    train = job.config.train
    if not _has_ramp(train) or find_problems(job.config, topology.devices)[0] is None:
        return job
    if estimate_job(job, topology).problems:
        return job

    def find_peak(one: PlanJob) -> tuple[float, int]:
        return estimate_job(one, topology).memory.peak, one.config.train.seq_len

    return max((_at_level(job, level) for level in configs.list_levels(train)), key=find_peak)


def _has_ramp(train: configs.Train) -> bool:
    return bool(train.batch_ramp or train.length_ramp)


def _list_ramps(train: configs.Train) -> list[str]:
    """Returns the fields of the ramps that `train` has."""
    ramps = {"batch_ramp": train.batch_ramp, "length_ramp": train.length_ramp}
    return [f"config.train.{name}" for name, ramp in ramps.items() if ramp]


def _at_level(job: PlanJob, level: configs.Train) -> PlanJob:
    """Returns the job at one of its batch shapes, with the FLOPs of rows of that length."""
    config = replace(job.config, train=level)
    full_flops, causal_flops = token_flops(config, job.matmul_params)
    return job._replace(config=config, full_flops=full_flops, causal_flops=causal_flops)


def describe_ramp(asked: configs.Train, planned: configs.Train) -> list[str]:
    """Returns a line about the batch shape that is planned, if `asked` has several."""
    count = len(configs.list_levels(asked))
    if asked.length_ramp:
        ramps = " and ".join(_list_ramps(asked))
        return [
            f"{ramps}: {count} batch shapes, each a program of its own; what follows is of the "
            f"one that needs most memory, {planned.batch_size:,} rows of "
            f"{planned.seq_len:,} tokens in {format_count(planned.accumulate, 'microbatch')}"
        ]
    if not asked.batch_ramp:
        return []
    return [
        f"config.train.batch_ramp: {count} batch sizes, each a program of its own; what follows is "
        f"of the one that needs most memory, {planned.batch_size:,} rows in "
        f"{format_count(planned.accumulate, 'microbatch')}. Its accumulate stands in the ramp"
    ]


def put_ramp_back(advice: Advice, asked: PlanJob, topology: Topology) -> Advice:
    """Returns the advice for one batch shape as advice for the ramps of `asked`.

    An offer stays if all batch shapes fit with it.
    """
    if not _has_ramp(asked.config.train) or not advice.offers:
        return advice

    offers = [
        offer._replace(config=_put_back(asked.config.train, offer.config))
        for offer in advice.offers
    ]
    offers = [offer for offer in offers if _fits_at_all_sizes(offer, asked, topology)]
    reason = ""
    if not offers:
        ramps = _list_ramps(asked.config.train)
        shape = "batch shape" if asked.config.train.length_ramp else "batch size"
        reason = (
            f"what helps the {shape} that needs most memory does not help all those of "
            f"{' and '.join(ramps)}; plan each alone, with "
            f"{' '.join(f'--{ramp}=()' for ramp in ramps)}"
        )
    return Advice(offers, reason)


def _put_back(asked: configs.Train, offer: configs.Config) -> configs.Config:
    """Returns `offer`, which has one batch shape, with all those of `asked`.

    The others get as many microbatches as keep them at the tokens that a microbatch has in `offer`.
    """
    planned = offer.train
    pieces = asked.seq_len // planned.seq_len
    most = planned.batch_size * planned.seq_len // planned.accumulate

    # Microbatches have whole rows at every length that goes with a batch size.
    rows: dict[int, int] = {}
    for level in configs.list_levels(asked):
        size = level.batch_size * level.seq_len // asked.seq_len
        rows[size] = math.gcd(rows.get(size, 0), level.batch_size)

    def split(size: int, accumulate: int) -> int:
        if size * pieces == planned.batch_size:
            return planned.accumulate
        while accumulate < rows[size] and (
            rows[size] % accumulate or size * asked.seq_len // accumulate > most
        ):
            accumulate += 1
        return accumulate

    train = replace(
        planned,
        seq_len=asked.seq_len,
        length_ramp=asked.length_ramp,
        loss_chunk=asked.loss_chunk,
        batch_size=asked.batch_size,
        accumulate=split(asked.batch_size, asked.accumulate),
        batch_ramp=tuple(
            (token, size, split(size, accumulate)) for token, size, accumulate in asked.batch_ramp
        ),
    )
    return replace(offer, train=train)


def _fits_at_all_sizes(offer: Candidate, asked: PlanJob, topology: Topology) -> bool:
    """Returns whether each batch shape of an offer divides over its mesh and fits the memory."""
    _, problems = find_problems(offer.config, topology.devices)
    if problems:
        return False
    largest = pick_largest(asked._replace(config=offer.config), topology)
    peak = estimate_job(largest, topology).memory.peak
    # The offer's own peak may be all that fits after a refusal of the compiler.
    return peak <= max(offer.estimate.memory.peak, MARGIN * topology.chip.memory)


def refuse_search(train: configs.Train) -> None:
    """Raises UsageError for a ramp, because a search chooses microbatches for one batch shape."""
    if train.length_ramp:
        raise UsageError(
            f"config.train.length_ramp = {train.length_ramp}: --search takes one row length; "
            "search the longest with --config.train.length_ramp=()"
        )
    if not train.batch_ramp:
        return
    largest = max(one.batch_size for one in configs.list_levels(train))
    raise UsageError(
        f"config.train.batch_ramp = {train.batch_ramp}: --search takes one batch size; search the "
        f"largest with --config.train.batch_ramp=() --config.train.batch_size={largest}"
    )
