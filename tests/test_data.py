"""Order, rows and streams: every vectorised answer against a slow loop, every stream against itself cut otherwise."""

import itertools
import threading
import time

import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.data import order, pipeline
from gpt_jax.data.rows import ROWS, InOrder
from gpt_jax.data.store import Tokens
from gpt_jax.data.tokenizer import byte_tokenizer
from gpt_jax.errors import DataError, UsageError

BYTES = byte_tokenizer()


def make_tokens(sizes, seed=0):
    """Documents of `sizes` random bytes, each ended by 256."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, 256, size), 256) for size in sizes]
    ids = np.concatenate(documents).astype(np.uint16)
    return Tokens("train", ids, np.cumsum([0, *map(len, documents)]), sum(sizes))


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 100, 255, 257, 1000, 4097, 12345])
def test_permutation_is_a_bijection_and_differs_by_epoch_and_seed(size):
    index = np.arange(size)
    zeros, ones = np.zeros(size, int), np.ones(size, int)
    first, second, other = (order.permute(index, size, *key) for key in ((3, zeros), (3, ones), (4, zeros)))
    assert all(sorted(out) == list(range(size)) for out in (first, second, other))
    if size > 60:
        assert max((first == index).mean(), (first == second).mean(), (first == other).mean()) < 0.1
    one_by_one = [order.permute(np.array([i]), size, 3, np.array([0]))[0] for i in range(min(size, 50))]
    assert one_by_one == first[:50].tolist()


def test_permutation_of_a_huge_set_stays_inside_and_mixes():
    size = 10**15 + 3
    out = order.permute(np.arange(20_000), size, 0, np.zeros(20_000, int))
    assert out.min() >= 0 and out.max() < size and len(set(out.tolist())) == 20_000
    assert abs(out.mean() / size - 0.5) < 0.01 and abs(np.corrcoef(np.arange(20_000), out)[0, 1]) < 0.03


def test_random_places_are_uniform_and_pure():
    out = order.random_below(10, 5, np.arange(100_000))
    assert np.abs(np.bincount(out, minlength=10) / 10_000 - 1).max() < 0.05
    assert (out[500:600] == order.random_below(10, 5, np.arange(500, 600))).all()
    assert (out != order.random_below(10, 6, np.arange(100_000))).mean() > 0.85


def test_windows_reach_every_place_and_are_slices():
    tokens = make_tokens([30, 9])
    rows = ROWS["window"](tokens, BYTES.token_bytes, 8, 0)
    indices = np.arange(3000)
    assert set(rows.starts(indices).tolist()) == set(range(len(tokens.tokens) - 8))
    got = rows.rows(indices)
    assert set(got) == {"tokens", "targets", "weight", "bytes"}
    for i, start in enumerate(rows.starts(indices)):
        assert (got["tokens"][i] == tokens.tokens[start: start + 8]).all()
        assert (got["targets"][i] == tokens.tokens[start + 1: start + 9]).all()
    assert (got["weight"] == 1).all() and (got["bytes"] == (got["targets"] < 256)).all()


def test_a_chunk_epoch_has_every_target_once():
    tokens = make_tokens([50, 3, 20, 31])
    rows = ROWS["chunk"](tokens, BYTES.token_bytes, 7, 1)
    assert rows.count == (len(tokens.tokens) - 1) // 7 and rows.left_out == (len(tokens.tokens) - 1) % 7
    for epoch in range(3):
        starts = rows.starts(np.arange(rows.count) + epoch * rows.count)
        assert sorted(starts) == list(range(0, rows.count * 7, 7))
    assert (rows.starts(np.arange(rows.count)) != starts).any()


def slow_packed(tokens, start, seq_len):
    """One packed row, token by token."""
    document_of = np.repeat(np.arange(tokens.documents), np.diff(tokens.offsets))
    end, out = len(tokens.tokens), {k: [] for k in ("tokens", "targets", "weight", "bytes", "segment", "position")}
    segment, position = 0, 0
    for place in range(start, start + seq_len):
        if place < end:
            new = place == start or document_of[place] != document_of[place - 1]
            segment, position = segment + new, 0 if new else position + 1
        learn = place + 1 < end and document_of[place] == document_of[place + 1]
        target = int(tokens.tokens[place + 1]) if place + 1 < end else 0
        row = (tokens.tokens[place] if place < end else 0, target, learn, learn and target < 256,
               segment if place < end else 0, position if place < end else 0)
        for column, value in zip(out.values(), row):
            column.append(int(value))
    return out


@pytest.mark.parametrize("sizes", [[5, 1, 1, 30, 2, 8], [40], [1] * 30, [16, 15, 17, 3]])
@pytest.mark.parametrize("seq_len", [1, 4, 16])
def test_packed_rows_against_a_loop(sizes, seq_len):
    tokens = make_tokens(sizes)
    train = ROWS["packed"](tokens, BYTES.token_bytes, seq_len, 0)
    held = InOrder(tokens, BYTES.token_bytes, seq_len, True)
    cases = [(train.rows(np.arange(train.count)), train.starts(np.arange(train.count))),
             (held.rows(np.arange(held.count + 2)), np.arange(held.count + 2) * seq_len)]
    for got, starts in cases:
        for i, start in enumerate(starts):
            for name, column in slow_packed(tokens, int(start), seq_len).items():
                assert got[name][i].tolist() == column, (name, start)
        assert got["tokens"].dtype == got["segment"].dtype == got["bytes"].dtype == np.int32
        assert got["weight"].dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 5, 8, 200])
@pytest.mark.parametrize("rows", list(ROWS))
def test_held_out_text_is_counted_once(rows, seq_len):
    tokens, data = make_tokens([20, 7, 33]), config.Data(rows=rows)
    batches = pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4))
    got = list(batches)
    assert len(got) == len(batches)
    seen = np.concatenate([b["targets"][b["weight"] > 0] for b in got]).tolist()
    starts = set(tokens.offsets.tolist()) if rows == "packed" else {0}
    assert seen == [int(t) for i, t in enumerate(tokens.tokens) if i not in starts]
    assert sum(b["bytes"].sum() for b in got) == sum(t < 256 for t in seen)
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(got, batches))  # iterates again, alike
    halves = [list(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(i, i + 2))) for i in (0, 2)]
    for whole, *parts in zip(got, *halves, strict=True):
        assert all((np.concatenate([p[k] for p in parts]) == whole[k]).all() for k in whole)
    assert len(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4), limit=1)) == 1


def take(stream, count):
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def same(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("rows", list(ROWS))
def test_batch_n_does_not_depend_on_slices_or_on_the_way_there(rows):
    tokens, data = make_tokens([40, 2, 90, 11, 60]), config.Data(rows=rows, prefetch=2)

    def stream(part, start=0):
        return pipeline.make_stream(tokens, BYTES, data, 8, 8, 7, part, start)

    whole = take(stream(slice(0, 8)), 10)  # several epochs of 25 rows
    for parts in (2, 4):
        size = 8 // parts
        shares = [take(stream(slice(i * size, (i + 1) * size)), 10) for i in range(parts)]
        for batch, *pieces in zip(whole, *shares, strict=True):
            assert same(batch, {k: np.concatenate([p[k] for p in pieces]) for k in batch})
    for start in (1, 4, 9):
        assert same(take(stream(slice(0, 8), start), 1)[0], whole[start])
    moving = stream(slice(0, 8))
    for n in range(3):
        assert moving.state() == {"next": n}
        next(moving)
    moving.close()
    assert same(take(stream(slice(0, 8), moving.state()["next"]), 1)[0], whole[3])
    far = take(stream(slice(0, 8), 10**12), 1)[0]
    assert far["tokens"].shape == (8, 8)
    assert not same(whole[0], take(pipeline.make_stream(tokens, BYTES, data, 8, 8, 8, slice(0, 8)), 1)[0])


def test_batches_are_made_ahead_and_elsewhere(monkeypatch):
    """Before they are asked for, by another thread than the one that asks."""
    made, make = [], pipeline.Batches.__getitem__
    monkeypatch.setattr(pipeline.Batches, "__getitem__", lambda batches, number: (
        made.append(threading.get_ident()), make(batches, number))[1])
    stream = pipeline.make_stream(make_tokens([100]), BYTES, config.Data(rows="chunk", prefetch=3), 8, 4, 0, slice(0, 4))
    next(stream)
    end = time.monotonic() + 60
    while len(made) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    stream.close()
    assert len(made) >= 3 and threading.get_ident() not in made


def test_the_tail_that_is_left_out_is_said():
    tokens = make_tokens([100])
    stream = pipeline.make_stream(tokens, BYTES, config.Data(rows="chunk"), 8, 4, 0, slice(0, 4))
    stream.close()
    assert stream.summary == ("chunk rows: 12 of 8 tokens an epoch; the last 4 tokens of the text fill no row and are "
                              "left out")


@pytest.mark.parametrize("rows", list(ROWS))
def test_too_little_text(rows):
    data, tokens = config.Data(rows=rows), make_tokens([63])
    with pytest.raises(UsageError, match="config.train.seq_len = 64: the training text has 64 tokens.* needs 65"):
        pipeline.make_stream(tokens, BYTES, data, 64, 1, 0, slice(0, 1))
    with pytest.raises(UsageError, match="config.train.batch_size = 8: the training text of 64 tokens has 7 rows"):
        pipeline.make_stream(tokens, BYTES, data, 9, 8, 0, slice(0, 8))
    take(pipeline.make_stream(tokens, BYTES, data, 63, 1, 0, slice(0, 1)), 2)
    lone = Tokens("eval", np.array([256], np.uint16), np.array([0, 1]), 0)
    with pytest.raises(UsageError, match="the eval text has 1 token"):
        pipeline.make_eval_batches(lone, BYTES, data, 8, 1, slice(0, 1))


def test_ids_beyond_the_vocabulary_stop_the_run():
    tokens = make_tokens([100])
    tokens.tokens[50] = 300
    stream = pipeline.make_stream(tokens, BYTES, config.Data(rows="chunk"), 8, 4, 0, slice(0, 4))
    with pytest.raises(DataError, match="holds the id 300 and the tokenizer only 257"):
        take(stream, 3)
