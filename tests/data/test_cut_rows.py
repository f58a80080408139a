"""Rows that are cut into shorter ones are those of a loop, on any number of processes."""

import itertools

import numpy as np
import pytest
from token_arrays import BYTES, EVERYTHING, alone, make_tokens, mixed, slow_row

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.rows import PACKINGS

ROW = 24
TRAIN = config.Train(
    batch_size=4,
    seq_len=ROW,
    batch_ramp=((300, 8, 1), (1400, 4, 1)),
    length_ramp=((0, 6), (300, 8), (800, 24), (1400, 12)),
)
SIZES = config.make_batch_sizes(TRAIN)
PLAIN = config.read_batch_sizes(SIZES.pairs(99))  # the same examples, whole
STEPS = 14


def open_text(sources):
    return alone(make_tokens([40, 2, 90, 11, 60] + [9, 5] * 20)) if sources == "alone" else mixed()


def take(examples, sizes, part=0, parts=1, start=0, count=STEPS):
    def share(rows):
        return slice(part * rows // parts, (part + 1) * rows // parts)

    stream = pipeline.make_ramp_stream(examples, sizes, share, start, STEPS)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def is_same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packing", list(PACKINGS))
@pytest.mark.parametrize("sources", ["alone", "mixed"])
def test_any_number_of_processes_and_any_start(sources, packing):
    more = EVERYTHING if sources == "mixed" else {}
    knobs = config.Data(packing=packing, prefetch=2, **more)
    examples = pipeline.make_examples(open_text(sources), knobs, ROW, 7)
    whole = take(examples, SIZES)
    shapes = {batch["tokens"].shape for batch in whole}
    assert shapes == {(16, 6), (24, 8), (8, 24), (8, 12)}

    # With eight processes a process has half of an example.
    for parts in (2, 4, 8):
        pieces = [take(examples, SIZES, part, parts) for part in range(parts)]
        for batch, *shares in zip(whole, *pieces, strict=True):
            joined = {name: np.concatenate([share[name] for share in shares]) for name in batch}
            assert is_same(batch, joined)
    for start in (1, 3, 7, 12):
        assert is_same(take(examples, SIZES, start=start, count=1)[0], whole[start])


@pytest.mark.parametrize("packing", list(PACKINGS))
def test_every_target_of_an_update_stays_one(packing):
    """Without a document mask a target's row decides nothing but what is seen before it."""
    examples = pipeline.make_examples(open_text("mixed"), config.Data(packing=packing), ROW, 7)
    for cut, whole in zip(take(examples, SIZES), take(examples, PLAIN), strict=True):
        assert all(np.array_equal(cut[name].ravel(), whole[name].ravel()) for name in whole)


@pytest.mark.parametrize("packing", list(PACKINGS))
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_cut_rows_against_a_loop(packing, document_mask, pieces):
    """Segments and positions begin anew in each row, and its documents are told."""
    knobs = config.Data(packing=packing, document_mask=document_mask)
    examples = pipeline.make_examples(open_text("alone"), knobs, ROW, 7)
    tokens = examples.rows[0].tokens
    numbers = np.arange(5, 40)
    got = examples.columns(numbers, pieces)
    for i, number in enumerate(numbers.tolist()):
        source, spans = examples.spans(number, pieces)
        assert source == 0
        for name, column in slow_row(tokens, spans, ROW // pieces, document_mask).items():
            assert got[name][i].tolist() == column, (name, number)
    # The weights are those of whole rows, too.
    whole = examples.columns(np.arange(8))
    cut = examples.columns(np.arange(8 * pieces), pieces)
    assert np.array_equal(cut["weight"].ravel(), whole["weight"].ravel())


def test_transforms_work_on_the_rows_that_are_left():
    """A document that is rearranged has all three of its sentinels in one row."""
    knobs = config.Data(packing="first_fit", fim=1.0)
    data = mixed()
    examples = pipeline.make_examples(data, knobs, 64, 0)
    columns = examples.fill(np.arange(80), 4).ids
    counts = [(columns == data.tokenizer.specials[name]).sum(1) for name in pipeline.FIM_ORDER]
    assert counts[0].sum() > 20
    assert np.array_equal(counts[0], counts[1]) and np.array_equal(counts[0], counts[2])
    assert BYTES.vocab < data.tokenizer.vocab
