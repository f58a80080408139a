"""The order of examples: permutations, windows, chunks and whole documents."""

import numpy as np
import pytest
from token_arrays import BYTES, make_tokens

from gpt_jax.data.stream import order
from gpt_jax.data.stream.rows import PACKINGS, make_columns


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
