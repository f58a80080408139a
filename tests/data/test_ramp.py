"""A stream whose batch size changes has the examples of one whose size does not."""

import itertools

import numpy as np
import pytest
from token_arrays import EVERYTHING, alone, make_tokens, mixed

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.rows import PACKINGS

ROW = 8
TRAIN = config.Train(batch_size=4, seq_len=ROW, batch_ramp=((70, 8, 1), (300, 12, 1), (900, 4, 1)))
SIZES = config.make_batch_sizes(TRAIN)
STEPS = 14  # all sizes, and several epochs


def take(stream, count):
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def share(part, parts):
    """The rows of one of several processes, for each batch size."""
    return lambda size: slice(part * size // parts, (part + 1) * size // parts)


def join(pieces):
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def is_same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", list(PACKINGS))
@pytest.mark.parametrize("sources", ["alone", "mixed"])
def test_a_ramp_reads_each_example_once_on_any_number_of_processes(sources, packing):
    data = alone(make_tokens([40, 2, 90, 11, 60] + [9, 5] * 20)) if sources == "alone" else mixed()
    more = {} if sources == "alone" else EVERYTHING
    knobs = config.Data(packing=packing, prefetch=2, **more)
    examples = pipeline.make_examples(data, knobs, ROW, 7)

    def stream(part, parts, start=0):
        return pipeline.make_ramp_stream(examples, SIZES, share(part, parts), start, STEPS)

    whole = take(stream(0, 1), STEPS)
    assert {len(batch["tokens"]) for batch in whole} == {4, 8, 12}
    count = SIZES.examples(STEPS)
    assert is_same(join(whole), examples.columns(np.arange(count)))

    # The same examples in batches of one size.
    plain = take(pipeline.make_stream(examples, 4, slice(0, 4)), -(-count // 4))
    assert is_same(join(whole), {name: x[:count] for name, x in join(plain).items()})

    for parts in (2, 4):
        pieces = [take(stream(part, parts), STEPS) for part in range(parts)]
        for batch, *others in zip(whole, *pieces, strict=True):
            assert is_same(batch, join(others))
    for start in (1, 3, 7, 12):
        assert is_same(take(stream(0, 1, start), 1)[0], whole[start])
    assert len(take(stream(0, 1, 10**12), 1)[0]["tokens"]) == 4


def test_epochs_and_phases_are_counted_in_examples():
    data = mixed()
    knobs = config.Data(packing="chunk", block=10, phases=((ROW * 20, (0.0, 1.0, 3.0)),))
    examples = pipeline.make_examples(data, knobs, ROW, 0)
    stream = pipeline.make_ramp_stream(examples, SIZES, share(0, 1), 0, STEPS)
    stream.close()
    count = SIZES.examples(STEPS)
    drawn = np.bincount(examples.assign(np.arange(count))[0], minlength=3)
    for line, part, rows in zip(stream.summary, drawn, examples.rows, strict=True):
        assert f"{part / rows.count:.2f} epochs, {part / count:.2%} of the rows" in line
    # The phase begins with example 20, which is the first one of update 4 (4 + 4 + 4 + 8 rows).
    first = next(step for step in range(STEPS) if SIZES.examples(step) > 20)
    assert stream.shares(first - 1) != stream.shares(first) == stream.shares(STEPS)
    assert first == 5

    short = pipeline.describe(examples, 20)
    assert "it is never reached" in short[-1] and len(stream.summary) == 3


def test_rows_of_past_sizes_are_not_asked_for():
    examples = pipeline.make_examples(alone(make_tokens([40, 90] * 20)), config.Data(), ROW, 7)

    def rows_of(size):
        assert size != 12, "this size is past"
        return slice(0, size)

    start = next(n for n in range(99) if SIZES.examples(n) * ROW >= 900)
    assert (
        len(take(pipeline.make_ramp_stream(examples, SIZES, rows_of, start), 1)[0]["tokens"]) == 4
    )
