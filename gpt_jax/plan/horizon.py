"""What a whole run comes to: tokens, epochs, days, and the size of a checkpoint."""

from typing import NamedTuple

from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.topology import Topology

DAY = 86_400  # Seconds.


class Horizon(NamedTuple):
    """A whole run."""

    tokens_per_step: int
    tokens: int
    tokens_per_parameter: float
    epochs: float | None  # None if nobody said how many tokens the data has.
    days: float
    by: str  # Whose seconds of a step the days are: "compiler" or "arithmetic".
    checkpoint_bytes: int
    checkpoint_seconds: float


def estimate_horizon(
    job: PlanJob,
    topology: Topology,
    step: float,
    tokens: int,
    by: str,
    data_tokens: float,
    write_bandwidth: float,
) -> Horizon:
    """Returns what the run comes to.

    `step` are the seconds of a step, and `by` says who measured them. `tokens` are those of the
    whole run, whose smaller batches take their part of a step's time. `write_bandwidth` are the
    bytes a second that one host writes to storage.
    """
    train = job.config.train
    tokens_per_step = train.batch_size * train.seq_len
    stored = sum(size * array.itemsize for array, size in job.state.items())
    return Horizon(
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        tokens_per_parameter=tokens / job.parameters,
        epochs=tokens / data_tokens if data_tokens else None,
        days=step * (tokens / tokens_per_step) / DAY,
        by=by,
        checkpoint_bytes=stored,
        checkpoint_seconds=stored / (topology.hosts * write_bandwidth),
    )
