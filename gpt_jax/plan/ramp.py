"""A run whose batch size changes is planned at the size that needs most memory."""

from dataclasses import replace

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.plan.estimate import estimate_job, find_problems
from gpt_jax.plan.job import PlanJob
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


def refuse_search(train: configs.Train) -> None:
    """Raises UsageError for a ramp, because a search chooses microbatches for one batch size."""
    if not train.batch_ramp:
        return
    largest = max(one.batch_size for one in configs.list_levels(train))
    raise UsageError(
        f"config.train.batch_ramp = {train.batch_ramp}: --search takes one batch size; search the "
        f"largest with --config.train.batch_ramp=() --config.train.batch_size={largest}"
    )
