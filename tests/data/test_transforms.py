"""Documents inside rows are shuffled and rearranged, and nothing else changes."""

import itertools

import numpy as np
import pytest

from gpt_jax.data.stream.rows import Buffer
from gpt_jax.data.stream.transforms import SHORTEST, fill_in_the_middle, shuffle_documents

EOT, PRE, SUF, MID = 256, 257, 258, 259


def make_buffer(rows, length):
    """Rows of pieces, each a list of ids.

    The first may be the tail of a document, without a mark.
    """
    ids, begins, inside = (
        np.zeros((len(rows), length), np.int32),
        *(np.zeros((len(rows), length), bool) for _ in "bi"),
    )

    for n, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            ids[n, at : at + len(piece)] = piece
            begins[n, at] = at > 0 or n % 2 == 0
            at += len(piece)
        inside[n, :at] = True
    return Buffer(ids, begins, inside, ids % 3 == 0)


def pieces_of(buffer, row):
    length = int(buffer.inside[row].sum())
    edges = [0, *(np.flatnonzero(buffer.begins[row, 1:length]) + 1), length]
    return [buffer.ids[row, a:b].tolist() for a, b in itertools.pairwise(edges)]


def random_rows(seed, count=30):
    rng = np.random.default_rng(seed)
    return [
        [[*rng.integers(0, 256, size).tolist(), EOT] for size in rng.integers(1, 30, 4)]
        for _ in range(count)
    ]


def test_shuffled_rows_hold_the_same_documents_in_other_orders():
    rows = random_rows(0)
    buffer = make_buffer(rows, 140)
    index = np.arange(30) + 1000
    moved = shuffle_documents(buffer, 5, index)
    for n, pieces in enumerate(rows):
        assert sorted(pieces_of(moved, n)) == sorted(pieces)
        assert (moved.inside[n] == buffer.inside[n]).all() and not moved.ids[n][
            ~moved.inside[n]
        ].any()
        assert not moved.begins[n][~moved.inside[n]].any()
        assert (moved.learn[n] == (moved.ids[n] % 3 == 0)).all()
    orders = {
        tuple(pieces.index(piece) for piece in pieces_of(moved, n)) for n, pieces in enumerate(rows)
    }
    assert len(orders) > 8

    for n in (0, 7):  # a row does not depend on its company
        alone = shuffle_documents(
            Buffer(*(column[n : n + 1] for column in buffer)), 5, index[n : n + 1]
        )
        assert (alone.ids[0] == moved.ids[n]).all()
    assert (shuffle_documents(buffer, 6, index).ids != moved.ids).any()


def undone(piece):
    """A rearranged piece in its old order, without its end of text and first three tokens."""
    assert piece[0] == PRE
    suffix, middle = piece.index(SUF), piece.index(MID)
    if suffix == 1:  # suffix first: everything after the middle's mark is prefix and middle
        return piece[middle + 1 :] + piece[2:middle]
    return piece[1:suffix] + piece[middle + 1 :] + piece[suffix + 1 : middle]


@pytest.mark.parametrize("spm", [0.0, 1.0, 0.5])
def test_rearranged_documents_can_be_put_together_again(spm):
    rows = random_rows(1)
    buffer, index = make_buffer(rows, 140), np.arange(30)
    moved = fill_in_the_middle(buffer, 9, index, 1.0, spm, (PRE, SUF, MID), EOT)
    assert (moved.begins == buffer.begins).all() and (moved.inside == buffer.inside).all()

    kinds = set()
    for n, pieces in enumerate(rows):
        for before, after in zip(pieces, pieces_of(moved, n), strict=True):
            assert after[-1] == EOT and len(after) == len(before)
            if len(before) < SHORTEST:
                assert after == before
                continue
            assert undone(after[:-1]) == before[3:-1]
            kinds.add(after[1] == SUF)
    assert kinds == {1.0: {True}}.get(
        spm, {False, True}
    )  # with spm 0 an empty prefix looks like it now and then


def test_the_rate_is_kept_and_rows_are_pure():
    rows = [[[7] * 20 + [EOT]] for _ in range(2000)]
    buffer, index = make_buffer(rows, 30), np.arange(2000)
    moved = fill_in_the_middle(buffer, 1, index, 0.25, 0.5, (PRE, SUF, MID), EOT)
    assert abs((moved.ids == PRE).any(1).mean() - 0.25) < 0.04
    assert not (
        fill_in_the_middle(buffer, 1, index, 0.0, 0.5, (PRE, SUF, MID), EOT).ids != buffer.ids
    ).any()

    part = fill_in_the_middle(
        Buffer(*(column[500:600] for column in buffer)),
        1,
        index[500:600],
        0.25,
        0.5,
        (PRE, SUF, MID),
        EOT,
    )
    assert (part.ids == moved.ids[500:600]).all()
