"""What one device has of a microbatch, and what a pipeline makes of it."""

import math
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.job import PlanJob, compute_bytes


class Microbatch(NamedTuple):
    """The part of one device in one of the `train.accumulate` microbatches of a step.

    In a pipeline it works on `tick_tokens` at a time, `ticks` times, through `tick_layers` layers.
    Without one it works on all its tokens, once, through all layers.
    """

    rows: float
    tokens: float
    tick_tokens: float
    ticks: int
    tick_layers: float


def split_microbatch(job: PlanJob, shape: dict[str, int]) -> Microbatch:
    """Returns the part of a device on a mesh of these axis sizes."""
    config = job.config
    layers = len(job.layers)
    row_parts = math.prod(shape[axis] for axis in configs.BATCH_AXES)
    rows = config.train.batch_size / config.train.accumulate / row_parts
    tokens = rows * config.train.seq_len / shape["context"]

    stages = shape["pipeline"]
    if stages == 1:
        return Microbatch(rows, tokens, tick_tokens=tokens, ticks=1, tick_layers=layers)
    rounds = config.compute.pipeline_rounds
    count = config.compute.pipeline_microbatches or stages
    return Microbatch(
        rows,
        tokens,
        tick_tokens=tokens * stages / count,
        ticks=rounds * count + stages - 1,
        tick_layers=layers / (rounds * stages),
    )


def stream_bytes(job: PlanJob, shape: dict[str, int]) -> float:
    """Returns the bytes of the residual stream for one token of a device."""
    model = job.config.model
    parts = shape["tensor"] if job.config.compute.shard_sequence else 1
    return model.embed * compute_bytes(job) / parts
