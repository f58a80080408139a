"""Training batches of a dataset in one call."""

from gpt_jax import config
from gpt_jax.data.stream import batches
from gpt_jax.data.stream.dataset import Dataset


def make_stream(
    data: Dataset,
    knobs: config.Data,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: slice,
    start: int = 0,
    steps: int = 0,
) -> batches.Stream:
    """Plans the rows of `data` and streams them from batch `start` on."""
    examples = batches.make_examples(data, knobs, seq_len, seed)
    return batches.make_stream(examples, batch_size, rows, start, steps)
