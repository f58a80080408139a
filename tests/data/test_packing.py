"""Packing against slow loops, and what holds of every plan.

Nothing is lost or cut, and no row is too full.
"""

import numpy as np
import pytest

from gpt_jax.data.stream import packing


def offsets_of(sizes):
    return np.cumsum([0, *sizes])


def slow_first_fit(sizes, capacity):
    rows = []
    for size in sizes:
        row = next((row for row in rows if sum(row) + size <= capacity), None)
        if row is None:
            rows.append(row := [])
        row.append(size)
    return rows


def slow_best_fit(sizes, capacity):
    rows = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= capacity]
        row = max(fitting, key=sum, default=None)
        if row is None:
            rows.append(row := [])
        row.append(size)
    return rows


@pytest.mark.parametrize("how, slow", [("first_fit", slow_first_fit), ("best_fit", slow_best_fit)])
@pytest.mark.parametrize("capacity", [9, 17, 40])
def test_blocks_side_by_side_are_packed_as_by_a_loop(how, slow, capacity):
    rng = np.random.default_rng(capacity)
    sizes = rng.integers(1, capacity + 1, (7, 60)).astype(np.int32)
    sizes[3, 40:] = 0  # a block that is not full
    arrange, choose = packing.FITS[how]
    order = arrange(sizes)
    arranged = np.take_along_axis(sizes, order, 1)
    rows, used = packing.place(arranged, capacity, choose)

    for block in range(len(sizes)):
        given = [int(s) for s in sizes[block] if s]
        found = [
            [int(s) for s, row in zip(arranged[block], rows[block], strict=True) if row == r and s]
            for r in range(used[block])
        ]
        assert found == slow(given, capacity)


@pytest.mark.parametrize("how", list(packing.FITS))
@pytest.mark.parametrize("seq_len", [1, 8, 64])
def test_every_token_is_in_one_row_and_predicted_once(how, seq_len, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 8)
    monkeypatch.setattr(packing, "BLOCKS_AT_ONCE", 3)  # several rounds, the last block not full
    sizes = np.random.default_rng(seq_len).integers(1, 150, 101)
    sizes[:4] = 1, seq_len, seq_len + 1, seq_len + 2
    offsets = offsets_of(sizes)
    capacity = seq_len + 1
    plan = packing.plan(offsets, capacity, how, 3)
    assert (
        plan.first[0] == 0
        and plan.first[-1] == len(plan.starts)
        and (np.diff(plan.first) > 0).all()
    )

    filled = np.add.reduceat(plan.sizes, plan.first[:-1])
    assert filled.max() <= capacity

    predicted = np.zeros(offsets[-1], int)
    seen = np.zeros(offsets[-1], int)
    for start, size in zip(plan.starts, plan.sizes, strict=True):
        document = np.searchsorted(offsets, start, "right") - 1
        assert start + size <= offsets[document + 1]  # never over the end of its document
        predicted[start + 1 : start + size] += 1
        seen[start : start + size] += 1
    first = np.zeros(offsets[-1], bool)
    first[offsets[:-1]] = True
    assert (predicted[~first] == 1).all() and (
        predicted[first] == 0
    ).all()  # what begins a document has no context
    assert (seen[first] == 1).all() and (seen >= 1).all()


def test_a_document_that_fits_is_never_cut():
    sizes = np.random.default_rng(0).integers(1, 34, 500)
    for how in packing.FITS:
        plan = packing.plan(offsets_of(sizes), 33, how, 0)
        assert sorted(plan.sizes.tolist()) == sorted(sizes.tolist())


def test_best_fit_wastes_less_than_first_fit_and_both_little():
    sizes = np.maximum(2, np.random.default_rng(1).lognormal(5.0, 1.0, 20_000).astype(int))
    fill = {}
    for how in packing.FITS:
        plan = packing.plan(offsets_of(sizes), 1025, how, 0)
        fill[how] = plan.sizes.sum() / (plan.rows * 1025)
    assert 0.97 < fill["first_fit"] < fill["best_fit"] < 1


def test_the_seed_decides_who_shares_a_row():
    offsets = offsets_of(np.random.default_rng(0).integers(1, 30, 300))
    plans = [packing.plan(offsets, 33, "first_fit", seed) for seed in (0, 0, 1)]
    same = [
        all(
            (getattr(plans[0], name) == getattr(plan, name)).all()
            if len(getattr(plans[0], name)) == len(getattr(plan, name))
            else False
            for name in ("first", "starts", "sizes")
        )
        for plan in plans
    ]

    assert same == [True, True, False]


def test_rows_at_documents_against_a_loop():
    for seed, seq_len in [(0, 4), (1, 16), (2, 100)]:
        offsets = offsets_of(np.random.default_rng(seed).integers(1, 40, 200))
        wanted = []
        at = 0
        while at < len(offsets) - 1:
            wanted.append(int(offsets[at]))
            at = next(
                (i for i in range(at, len(offsets) - 1) if offsets[i] >= offsets[at] + seq_len),
                len(offsets),
            )
        assert packing.at_documents(offsets, seq_len).tolist() == wanted


@pytest.mark.parametrize("ending", [[10], [10, 10], [10, 10, 10]])
def test_no_row_begins_with_nothing(ending):
    """There are empty documents at the end, as an index of another tool may have them."""
    assert packing.at_documents(np.array([0, 4, 4, *ending]), 4).tolist() == [0, 4]
