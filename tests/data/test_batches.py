"""Streams of batches: each equals itself when it is cut otherwise."""

import itertools
import threading
import time

import numpy as np
import pytest
from streams import make_stream
from token_arrays import BYTES, EVERYTHING, alone, in_memory, make_tokens, mixed, slow_row

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.dataset import Dataset, Part
from gpt_jax.data.stream.rows import PACKINGS
from gpt_jax.errors import DataError, UsageError


def take(stream, count):
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def same(a, b):
    return a.keys() == b.keys() and all(
        (a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a
    )


CASES = [("alone", packing, {}) for packing in PACKINGS] + [
    ("mixed", packing, EVERYTHING) for packing in PACKINGS
]


@pytest.mark.parametrize("sources, packing, knobs", CASES)
def test_batch_n_does_not_depend_on_slices_or_on_the_way_there(sources, packing, knobs):
    data = alone(make_tokens([40, 2, 90, 11, 60] + [9, 5] * 20)) if sources == "alone" else mixed()
    knobs = config.Data(packing=packing, prefetch=2, **knobs)

    def stream(part, start=0, seed=7):
        return make_stream(data, knobs, 8, 24, seed, part, start)

    whole = take(stream(slice(0, 24)), 10)  # several epochs, and both phases
    for parts in (2, 3, 4, 8):
        size = 24 // parts
        shares = [take(stream(slice(i * size, (i + 1) * size)), 10) for i in range(parts)]
        for batch, *pieces in zip(whole, *shares, strict=True):
            assert same(batch, {k: np.concatenate([p[k] for p in pieces]) for k in batch})
    for start in (1, 4, 9):
        assert same(take(stream(slice(0, 24), start), 1)[0], whole[start])
    moving = stream(slice(0, 24))
    for n in range(3):
        assert moving.state() == {"next": n}
        next(moving)
    moving.close()
    assert same(take(stream(slice(0, 24), moving.state()["next"]), 1)[0], whole[3])
    assert take(stream(slice(0, 24), 10**12), 1)[0]["tokens"].shape == (24, 8)
    assert not same(whole[0], take(stream(slice(0, 24), seed=8), 1)[0])


@pytest.mark.parametrize("packing", list(PACKINGS))
def test_a_mixed_batch_says_where_its_rows_come_from(packing):
    data = mixed()
    knobs = config.Data(packing=packing, block=10, phases=EVERYTHING["phases"])
    examples = pipeline.make_examples(data, knobs, 8, 3)
    got, indices = examples.columns(np.arange(40, 70)), range(40, 70)
    counts = np.zeros(3, int)
    for row, index in enumerate(indices):
        source, inside = examples.spans(index)
        counts[source] += 1
        assert (
            got["tokens"][row].tolist()
            == slow_row(data.parts[source].train, inside, 8, False)["tokens"]
        )
    stage = examples.mix.counts[0], examples.mix.counts[1]
    # The second phase begins at token 400, which is example 50.
    assert counts.tolist() == (stage[0] + 2 * stage[1]).tolist()


def test_shares_are_of_tokens_or_documents_and_sizes_count_by_temperature():
    parts = tuple(
        Part(name, 1.0, make_tokens([size] * count), None)
        for name, size, count in (("long", 159, 10), ("short", 9, 40))
    )
    data = Dataset(parts, BYTES, "")

    def shares(**knobs):
        examples = pipeline.make_examples(data, config.Data(packing="chunk", **knobs), 16, 0)
        return (examples.mix.counts[0] / 1000).round(2).tolist()

    assert shares() == [0.5, 0.5]
    assert shares(weights="documents") == [0.94, 0.06]  # as many documents of 160 as of 10
    assert shares(temperature=1.0) == [0.8, 0.2]  # 1,600 and 400 tokens
    assert shares(temperature=2.0) == [0.67, 0.33]  # as their square roots


@pytest.mark.parametrize(
    "weights, knobs, message",
    [
        ((0.0, 0.0, 0.0), {}, "the weights .* must be 0 or more, and not all 0"),
        ((1.0, -1.0, 1.0), {}, "the weights .* must be 0 or more"),
        (
            (1.0, 1.0, 1.0),
            {"phases": ((100, (1.0, 1.0)),)},
            r"config.data.phases\[0\] = .*expected 3 weights, for a, b, c",
        ),
        (
            (1.0, 1.0, 1.0),
            {"phases": ((1, (1.0, 1.0, 0.0)), (2, (0.0, 1.0, 1.0)))},
            r"phases\[1\] begins at token 2, within the first row",
        ),
        (
            (1.0, 1.0, 1e-6),
            {},
            "config.data.block = 1000: the share .* of source c is less than one example",
        ),
        (
            (1.0, 1.0, 0.0),
            {"packing": "best_fit", "phases": ((5, (0.0, 0.0, 0.0)),)},
            r"phases\[0\].*not all 0",
        ),
        (
            (1.0, 1.0, 1.0),
            {"fim": 0.5},
            "config.data.fim = 0.5: the tokenizer bytes has no <|fim_prefix|>",
        ),
    ],
)
def test_mixtures_that_cannot_be(weights, knobs, message):
    data = mixed()
    parts = tuple(
        part._replace(weight=weight) for part, weight in zip(data.parts, weights, strict=False)
    )
    with pytest.raises(UsageError, match=message):
        pipeline.make_examples(Dataset(parts, BYTES, ""), config.Data(**knobs), 8, 0)


def test_shares_of_the_held_out_mean_are_those_of_the_phase_and_not_of_the_length_of_the_run():
    phases = ((8 * 20, (0.0, 1.0, 3.0)),)  # from example 20 on
    knobs = config.Data(packing="chunk", block=10, phases=phases)
    streams = [make_stream(mixed(), knobs, 8, 5, 0, slice(0, 5), 0, steps) for steps in (1, 50)]
    for stream in streams:
        assert stream.shares(0) == stream.shares(4) == streams[0].shares(1)
        assert stream.shares(5) == streams[0].shares(5)
        # Of 10 rows, 2.5 and 7.5 are due. The first of equal remainders gets the row that is left.
        assert list(stream.shares(5).values()) == [0.0, 0.3, 0.7]
        stream.close()


def test_a_source_smaller_than_its_share_of_a_batch():
    with pytest.raises(
        UsageError,
        match=r"config\.train\.batch_size = 400: 200 of them from source a, which of 6.. "
        r"tokens has 78 rows",
    ):
        make_stream(mixed(), config.Data(packing="chunk"), 8, 400, 0, slice(0, 8))


def test_epochs_are_counted_before_the_run_starts():
    data = mixed()
    stream = make_stream(
        data, config.Data(packing="chunk", block=10), 8, 20, 0, slice(0, 20), steps=50
    )
    stream.close()
    rows = [(part.train.size - 1) // 8 for part in data.parts]
    for line, name, count, part in zip(stream.summary, "abc", rows, (0.5, 0.3, 0.2), strict=True):
        assert line.startswith(
            f"source {name}: {1000 * part / count:.2f} epochs, {part:.2%} of the rows; chunk rows: "
            f"{count} "
        )
    assert stream.shares(50) == {"a": 0.5, "b": 0.3, "c": 0.2}


def test_batches_are_made_ahead_and_elsewhere(monkeypatch):
    """A thread other than the one that asks makes them before they are asked for."""
    made, make = [], pipeline.Batches.__getitem__
    monkeypatch.setattr(
        pipeline.Batches,
        "__getitem__",
        lambda batches, number: (made.append(threading.get_ident()), make(batches, number))[1],
    )
    stream = make_stream(
        alone(make_tokens([100])), config.Data(packing="chunk", prefetch=3), 8, 4, 0, slice(0, 4)
    )
    next(stream)
    end = time.monotonic() + 60
    while len(made) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    stream.close()
    assert len(made) >= 3 and threading.get_ident() not in made


def test_the_tail_that_is_left_out_is_said():
    tokens = make_tokens([100])
    stream = make_stream(alone(tokens), config.Data(packing="chunk"), 8, 4, 0, slice(0, 4))
    stream.close()
    assert stream.summary == (
        "chunk rows: 12 of 8 tokens an epoch; 4 tokens fill no row and are left out",
    )


@pytest.mark.parametrize("packing", ["window", "chunk"])
def test_too_little_text(packing):
    data, tokens = config.Data(packing=packing), make_tokens([63])
    with pytest.raises(
        UsageError, match=r"config\.train\.seq_len = 64: the training text has 64 tokens.* needs 65"
    ):
        make_stream(alone(tokens), data, 64, 1, 0, slice(0, 1))
    with pytest.raises(
        UsageError,
        match=r"config\.train\.batch_size = 8: the training text of 64 tokens has 7 rows",
    ):
        make_stream(alone(tokens), data, 9, 8, 0, slice(0, 8))
    take(make_stream(alone(tokens), data, 63, 1, 0, slice(0, 1)), 2)
    lone = in_memory("eval", np.array([256], np.uint16), np.array([0, 1]), 0)
    with pytest.raises(
        UsageError,
        match=r"the held-out text of source wiki has 1 token.*--eval_fraction of prepare",
    ):
        pipeline.make_eval_batches(
            lone, BYTES, data, 8, 1, slice(0, 1), 0, "the held-out text of source wiki"
        )


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_text_without_a_target_is_refused(packing):
    """Documents of one token that are kept apart have none. One longer document is enough."""
    data = config.Data(packing=packing, document_mask=True)
    words = r"config\.data\.document_mask = True: {} has no document of two tokens"
    ids = np.arange(64, dtype=np.uint16)
    empty = in_memory("train", ids, np.arange(65), 64)
    with pytest.raises(UsageError, match=words.format("the training text")):
        make_stream(alone(empty), data, 8, 1, 0, slice(0, 1))
    with pytest.raises(UsageError, match=words.format("the held-out text")):
        pipeline.make_eval_batches(empty, BYTES, data, 8, 1, slice(0, 1))

    longer = in_memory("train", ids, [*range(63), 64], 64)
    make_stream(alone(longer), data, 8, 1, 0, slice(0, 1)).close()
    assert len(pipeline.make_eval_batches(longer, BYTES, data, 8, 1, slice(0, 1))) == 8


@pytest.mark.parametrize(
    "dtype, wrong", [(np.uint16, 300), (np.uint32, 2**31 + 5), (np.uint32, 2**32 - 1)]
)
def test_ids_beyond_the_vocabulary_stop_the_run(dtype, wrong):
    """So do ids that a flipped bit has made negative as int32."""
    ids = np.append(np.arange(97, 97 + 99) % 256, 256).astype(dtype)
    ids[50] = wrong
    tokens = in_memory("train", ids, [0, 100], 99)
    stream = make_stream(alone(tokens), config.Data(packing="chunk"), 8, 4, 0, slice(0, 4))
    with pytest.raises(DataError, match=f"holds the id {wrong} and the tokenizer only 257"):
        take(stream, 3)
