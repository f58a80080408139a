"""Order, rows and streams.

Every vectorised answer equals a slow loop, and every stream equals itself when it is cut otherwise.
"""

import itertools
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
from streams import make_stream

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline, order
from gpt_jax.data.stream.dataset import Dataset, Part
from gpt_jax.data.stream.rows import PACKINGS, InOrder, make_columns, spans
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer, with_specials
from gpt_jax.data.tokens.shards import DOCUMENT, Tokens
from gpt_jax.errors import DataError, UsageError

BYTES = make_byte_tokenizer()


class TokenArray(NamedTuple):
    """Ids in memory, read like those of a TokenFile."""

    ids: np.ndarray
    path = "memory"

    @property
    def dtype(self) -> np.dtype:
        return self.ids.dtype

    @property
    def size(self) -> int:
        return len(self.ids)

    def read(self, start: int, out: np.ndarray) -> None:
        out[:] = self.ids[start : start + len(out)]


def in_memory(name, ids, offsets, size):
    """Tokens that lie in no file, from `size` bytes of text."""
    return Tokens(
        name,
        (TokenArray(ids),),
        np.asarray(offsets, np.int64),
        np.zeros(len(offsets) - 1, DOCUMENT),
        size,
    )


def make_tokens(sizes, seed=0):
    """Documents of `sizes` random bytes, each ended by 256."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, 256, size), 256) for size in sizes]
    ids = np.concatenate(documents).astype(np.uint16)
    return in_memory("train", ids, np.cumsum([0, *map(len, documents)]), sum(sizes))


def alone(tokens):
    """A Dataset of one text."""
    return Dataset((Part("text", 1.0, tokens, None),), BYTES, "")


def ids_of(tokens):
    return tokens.ids(0, tokens.size)


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 100, 255, 257, 1000, 4097, 12345])
def test_permutation_is_a_bijection_and_differs_by_epoch_and_seed(size):
    index = np.arange(size)
    zeros, ones = np.zeros(size, int), np.ones(size, int)
    first, second, other = (
        order.permute(index, size, *key) for key in ((3, zeros), (3, ones), (4, zeros))
    )
    assert all(sorted(out) == list(range(size)) for out in (first, second, other))
    if size > 60:
        assert max((first == index).mean(), (first == second).mean(), (first == other).mean()) < 0.1
    one_by_one = [
        order.permute(np.array([i]), size, 3, np.array([0]))[0] for i in range(min(size, 50))
    ]
    assert one_by_one == first[:50].tolist()


def test_permutation_of_a_huge_set_stays_inside_and_mixes():
    size = 10**15 + 3
    out = order.permute(np.arange(20_000), size, 0, np.zeros(20_000, int))
    assert out.min() >= 0 and out.max() < size and len(set(out.tolist())) == 20_000
    assert (
        abs(out.mean() / size - 0.5) < 0.01
        and abs(np.corrcoef(np.arange(20_000), out)[0, 1]) < 0.03
    )


def test_random_places_are_uniform_and_pure():
    out = order.random_below(10, 5, np.arange(100_000))
    assert np.abs(np.bincount(out, minlength=10) / 10_000 - 1).max() < 0.05
    assert (out[500:600] == order.random_below(10, 5, np.arange(500, 600))).all()
    assert (out != order.random_below(10, 6, np.arange(100_000))).mean() > 0.85


def test_windows_reach_every_place_and_are_slices():
    tokens = make_tokens([30, 9])
    rows = PACKINGS["window"](tokens, 8, 0)
    indices = np.arange(3000)
    assert set(rows.starts(indices).tolist()) == set(range(tokens.size - 8))
    got = make_columns(rows.fill(indices), BYTES.token_bytes, False)
    assert set(got) == {"tokens", "targets", "weight", "bytes"}
    for i, start in enumerate(rows.starts(indices)):
        assert (got["tokens"][i] == tokens.ids(start, start + 8)).all()
        assert (got["targets"][i] == tokens.ids(start + 1, start + 9)).all()
    assert (got["weight"] == 1).all() and (got["bytes"] == (got["targets"] < 256)).all()


def test_a_chunk_epoch_has_every_target_once():
    tokens = make_tokens([50, 3, 20, 31])
    rows = PACKINGS["chunk"](tokens, 7, 1)
    assert rows.count == (tokens.size - 1) // 7 and rows.lost == (tokens.size - 1) % 7
    for epoch in range(3):
        starts = rows.starts(np.arange(rows.count) + epoch * rows.count)
        assert sorted(starts) == list(range(0, rows.count * 7, 7))
    assert (rows.starts(np.arange(rows.count)) != starts).any()


@pytest.mark.parametrize("kind", ["document", "first_fit", "best_fit"])
def test_an_epoch_of_whole_documents(kind):
    """Every row comes once an epoch, each time in another order.

    Packed rows lose nothing, and rows that begin at documents lose what they say.
    """
    tokens = make_tokens(np.random.default_rng(0).integers(1, 40, 60))
    rows = PACKINGS[kind](tokens, 16, 1)
    epochs = [
        [tuple(rows.spans(i)) for i in range(e * rows.count, (e + 1) * rows.count)] for e in (0, 1)
    ]
    assert (
        sorted(epochs[0]) == sorted(epochs[1])
        and epochs[0] != epochs[1]
        and len(set(epochs[0])) == rows.count
    )
    got = make_columns(rows.fill(np.arange(rows.count)), BYTES.token_bytes, False)
    seen = {
        (span.document, span.offset + i)
        for row in epochs[0]
        for span in row
        for i in range(span.size)
    }
    if kind == "document":
        assert all(row[0].offset == 0 and row[0].column == 0 for row in epochs[0])
        assert int(got["weight"].sum()) == tokens.size - 1 - rows.lost and rows.lost > 0
        assert rows.filled == pytest.approx(got["weight"].mean())
    else:
        assert len(seen) == tokens.size and rows.lost == 0
        filled = sum(span.size for row in epochs[0] for span in row) / (rows.count * 17)
        assert rows.filled == pytest.approx(filled) and filled > 0.85


def slow_row(tokens, spans, seq_len, document_mask):
    """One row, token by token, from the documents that it is said to hold."""
    ids, document = [], []
    for number, span in enumerate(spans):
        assert span.column == len(ids)
        start = int(tokens.offsets[span.document]) + span.offset
        ids += tokens.ids(start, start + span.size).tolist()
        document += [number + 1] * span.size
    names = ("tokens", "targets", "weight", "bytes") + (
        ("segment", "position") if document_mask else ()
    )
    out, position = {name: [] for name in names}, 0
    for place in range(seq_len):
        there, next_there = place < len(ids), place + 1 < len(ids)
        new = there and (place == 0 or document[place] != document[place - 1])
        position = 0 if new or not there else position + 1
        learn = next_there and (not document_mask or document[place] == document[place + 1])
        target = ids[place + 1] if next_there else 0
        row = (
            ids[place] if there else 0,
            target,
            learn,
            learn and target < 256,
            document[place] if there else 0,
            position,
        )
        for column, value in zip(out.values(), row, strict=False):
            column.append(int(value))
    return out


@pytest.mark.parametrize("sizes", [[5, 1, 1, 30, 2, 8], [40], [1] * 30, [16, 15, 17, 3]])
@pytest.mark.parametrize("seq_len", [1, 4, 16])
@pytest.mark.parametrize("kind", list(PACKINGS))
@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_against_a_loop(kind, sizes, seq_len, document_mask):
    tokens = make_tokens(sizes)
    rows = PACKINGS[kind](tokens, seq_len, 0)
    got = make_columns(rows.fill(np.arange(rows.count)), BYTES.token_bytes, document_mask)
    for i in range(rows.count):
        for name, column in slow_row(tokens, rows.spans(i), seq_len, document_mask).items():
            assert got[name][i].tolist() == column, (name, i)
    held = InOrder(tokens, seq_len)
    evals = make_columns(held.fill(np.arange(held.count + 2)), BYTES.token_bytes, document_mask)
    for i in range(held.count + 2):
        start = i * seq_len
        inside = list(
            spans(
                tokens,
                [(start, max(0, min(seq_len + 1, tokens.size - start)))]
                if start < tokens.size
                else [],
            )
        )
        for name, column in slow_row(tokens, inside, seq_len, document_mask).items():
            assert evals[name][i].tolist() == column, (name, i)
    assert {got[name].dtype for name in got} == {np.dtype(np.int32), np.dtype(np.float32)}
    assert got["weight"].dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 5, 8, 200])
@pytest.mark.parametrize("document_mask", [False, True])
def test_held_out_text_is_counted_once(document_mask, seq_len):
    tokens, data = make_tokens([20, 7, 33]), config.Data(document_mask=document_mask)
    batches = pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4))
    got = list(batches)
    assert len(got) == len(batches)
    seen = np.concatenate([b["targets"][b["weight"] > 0] for b in got]).tolist()
    starts = set(tokens.offsets.tolist()) if document_mask else {0}
    assert seen == [int(t) for i, t in enumerate(ids_of(tokens)) if i not in starts]
    assert sum(b["bytes"].sum() for b in got) == sum(t < 256 for t in seen)
    # The batches are the same when they are iterated again.
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(got, batches, strict=True))
    halves = [
        list(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(i, i + 2)))
        for i in (0, 2)
    ]
    for whole, *parts in zip(got, *halves, strict=True):
        assert all((np.concatenate([p[k] for p in parts]) == whole[k]).all() for k in whole)
    assert (
        len(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4), limit=1)) == 1
    )


def take(stream, count):
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def same(a, b):
    return a.keys() == b.keys() and all(
        (a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a
    )


def mixed(seed=0):
    """Three sources of different sizes. The third has two shards."""
    parts = [
        make_tokens(np.random.default_rng(seed + i).integers(1, 30, n), seed + i)
        for i, n in enumerate((40, 90, 60))
    ]
    third, cut = parts[2], int(parts[2].offsets[4])
    split = Tokens(
        "train",
        (TokenArray(third.ids(0, cut)), TokenArray(third.ids(cut, third.size))),
        third.offsets,
        third.docs,
        third.bytes,
    )
    return Dataset(
        tuple(
            Part(name, weight, tokens, None)
            for name, weight, tokens in zip(
                "abc", (0.5, 0.3, 0.2), (*parts[:2], split), strict=True
            )
        ),
        with_specials(BYTES, pipeline.FIM_ORDER),
        "",
    )


EVERYTHING = dict(
    document_mask=True, shuffle_documents=True, fim=0.5, block=10, phases=((400, (0.2, 0.2, 0.6)),)
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
