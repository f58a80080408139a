"""Mixtures: exact shares, every row of a source in turn, and phases.

All of it follows from the number of an example alone.
"""

import math

import numpy as np
import pytest

from gpt_jax.data.stream.mixture import apportion, check, make
from gpt_jax.errors import UsageError

COUNTS = np.array([[7, 2, 1], [0, 5, 5], [3, 3, 4]])
MIX = make(COUNTS, [0, 40, 90], 11)


def test_every_block_holds_each_share_exactly_and_in_its_own_order():
    source, _ = MIX.assign(np.arange(150))
    for block in range(15):
        phase = sum(block >= begin for begin in (0, 4, 9)) - 1
        here = source[block * 10 : block * 10 + 10]
        assert np.bincount(here, minlength=3).tolist() == COUNTS[phase].tolist()
    assert len({tuple(source[i : i + 10]) for i in range(0, 40, 10)}) > 1
    assert (
        sum((source[i : i + 10] == sorted(source[i : i + 10])).all() for i in range(0, 150, 10)) < 3
    )


def test_a_source_gives_its_rows_in_turn_through_blocks_and_stages():
    source, nth = MIX.assign(np.arange(150))
    for i in range(3):
        drawn = nth[source == i]
        assert sorted(drawn) == list(range(len(drawn)))
        ends = list(range(0, 151, 10))
        for end in ends:  # after any whole number of blocks, exactly the first ones
            assert sorted(nth[:end][source[:end] == i]) == list(range(MIX.drawn(end)[i]))


def test_drawn_counts_any_number_of_examples():
    source, _ = MIX.assign(np.arange(150))
    for examples in (0, 1, 7, 10, 39, 40, 41, 95, 149):
        assert MIX.drawn(examples).tolist() == np.bincount(source[:examples], minlength=3).tolist()


def test_shares_are_those_of_the_phase_an_example_is_in():
    mix = make(np.array([[6, 4], [1, 9]]), [0, 31], 0)
    assert [mix.shares(i).tolist() for i in (0, 29, 30)] == [[0.6, 0.4]] * 3
    assert [mix.shares(i).tolist() for i in (31, 10**12)] == [[0.1, 0.9]] * 2


@pytest.mark.parametrize("begins", [[0, 3, 95], [0, 47, 48], [0, 10, 33], [0, 1, 2]])
def test_a_phase_begins_at_the_very_example_asked_for_and_counts_its_blocks_from_there(begins):
    total = begins[-1] + 40
    source, nth = (mix := make(COUNTS, begins, 11)).assign(np.arange(total))
    for begin, end, counts in zip(begins, [*begins[1:], total], COUNTS, strict=True):
        for at in range(begin, end, 10):
            size = min(10, end - at)
            found = np.bincount(source[at : at + size], minlength=3)
            assert (np.abs(found - counts * size / 10) < (1 if size < 10 else 0.01)).all()
    for i in range(3):  # and no row of a source is left out or given twice where blocks are cut
        assert sorted(nth[source == i]) == list(range((source == i).sum()))
    for examples in range(total + 1):
        assert mix.drawn(examples).tolist() == np.bincount(source[:examples], minlength=3).tolist()


@pytest.mark.parametrize(
    "phases, message",
    [
        (((0, (1.0,)),), r"config.data.sources = .* expected 2 weights, for a, b"),
        (((0, (0.0, 0.0)),), "config.data.sources: the weights .* not all 0"),
        (((0, (math.nan, 1.0)),), "config.data.sources: the weights"),
        (
            ((0, (1.0, 1.0)), (50, (1.0, -1.0))),
            r"config.data.phases\[0\]: the weights .* 0 or more",
        ),
        (((0, (1.0, 1.0)), (0, (1.0, 1.0))), r"config.data.phases\[0\] begins at token 0"),
        (
            ((0, (1.0, 1.0)), (50, (1.0, 1.0)), (50, (1.0, 1.0))),
            r"config.data.phases\[1\] .* give phases in rising order",
        ),
        (
            ((0, (1.0, 1.0)), (50, (1.0, 1.0, 1.0))),
            r"config.data.phases\[0\] = .* expected 2 weights",
        ),
    ],
)
def test_phases_that_cannot_be(phases, message):
    with pytest.raises(UsageError, match=message):
        check(phases, ("a", "b"))


def test_one_by_one_is_all_at_once_and_far_is_near():
    together = MIX.assign(np.arange(60, 90))
    for i, n in enumerate(range(60, 90)):
        assert [x[0] for x in MIX.assign(np.array([n]))] == [x[i] for x in together]
    source, nth = MIX.assign(10**12 + np.arange(10))
    assert np.bincount(source, minlength=3).tolist() == [3, 3, 4] and nth.min() > 10**11


def test_shares_by_largest_remainder():
    assert apportion(np.array([0.7, 0.2, 0.1]), 1000, ("a", "b", "c")).tolist() == [700, 200, 100]
    assert apportion(np.array([1.0, 1.0, 1.0]), 1000, ("a", "b", "c")).tolist() == [334, 333, 333]
    assert apportion(np.array([5.0, 0.0]), 7, ("a", "b")).tolist() == [7, 0]
    for seed in range(20):
        shares = np.random.default_rng(seed).random(6) + 0.01
        counts = apportion(shares, 1000, tuple("abcdef"))
        assert counts.sum() == 1000 and np.abs(counts - shares / shares.sum() * 1000).max() < 1


def test_a_share_too_small_for_the_block_is_refused():
    with pytest.raises(
        UsageError,
        match=r"config\.data\.block = 100: the share 0\.001 of source b is less than one example",
    ):
        apportion(np.array([0.999, 0.001]), 100, ("a", "b"))
