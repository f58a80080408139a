"""Tests of a difference, against plain enumeration and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gpt_jax.evals import core_mean, paired
from gpt_jax.evals.compared import compare_tasks
from gpt_jax.evals.core_tasks import BY_NAME
from gpt_jax.evals.results import Answer, TaskResult

COUNTS = {"left_out": 0, "cut": 0, "not_finite": 0}


def make_task(name: str, rights, source: str = "", baseline: float = 0.0) -> TaskResult:
    """A task whose rows are numbered from 1. None is a row that was not asked."""
    answers = [
        Answer(row, f"key {row}", (bool(right),))
        for row, right in enumerate(rights, 1)
        if right is not None
    ]
    return TaskResult(name, ("acc",), answers, COUNTS, baseline, 0, source)


@pytest.mark.parametrize("flips", range(9))
def test_p_counts_the_throws_of_coins(flips):
    """All sequences of throws are equally likely; those as far from the middle are counted."""
    throws = [sum(coins) for coins in itertools.product((0, 1), repeat=flips)]
    for heads in range(flips + 1):
        far = [other for other in throws if abs(other - flips / 2) >= abs(heads - flips / 2)]
        assert paired.find_mcnemar_p(heads, flips - heads) == len(far) / len(throws)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (3, 14), (250, 300), (4000, 4300)])
def test_p_is_that_of_scipy(gained, lost):
    expected = 1.0
    if gained + lost:
        expected = stats.binomtest(gained, gained + lost).pvalue
    assert paired.find_mcnemar_p(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gain, loss", [(0.05, 0.05), (0.2, 0.1), (0.4, 0.05), (0.02, 0.3)])
def test_intervals_hold_the_truth_as_often_as_they_say(gain, loss):
    """The chance of each outcome of 30 questions is added up where the interval has the truth."""
    count = 30
    held = 0.0
    for gained in range(count + 1):
        for lost in range(count + 1 - gained):
            low, high = paired.find_interval(gained, lost, count)
            if low <= gain - loss <= high:
                outcome = [gained, lost, count - gained - lost]
                held += stats.multinomial.pmf(outcome, count, [gain, loss, 1 - gain - loss])
    assert 0.94 < held < 0.995


def test_an_interval_is_never_empty():
    for count in (1, 2, 50):
        low, high = paired.find_interval(0, 0, count)
        assert -1 <= low < 0 < high <= 1 and low == pytest.approx(-high)


def test_answers_are_compared_in_pairs():
    old = [True, True, False, False, False, True]
    new = [True, False, True, True, True, True]
    found = paired.compare_answers(old, new)
    assert found[:3] == (6, 3, 1) and found.difference.value == pytest.approx(1 / 3)
    assert found.difference.p == pytest.approx(stats.binomtest(3, 4).pvalue)
    turned = paired.compare_answers(new, old)
    assert turned.gained == 1 and turned.difference.low == -found.difference.high


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (0, 1), (2, 1), (9, 4), (3, 13)])
def test_one_file_is_compared_as_a_task_is(gained, lost):
    """Questions that weigh the same have McNemar's p, and the interval of a task."""
    count = 20
    signs = [1.0] * gained + [-1.0] * lost + [0.0] * (count - gained - lost)
    for weight in (1 / count, 1 / 3 / count):
        found = paired.compare_sums([paired.Source([s * weight for s in signs], weight)])
        scale = weight * count
        assert found.value == pytest.approx((gained - lost) / count * scale)
        assert found.p == pytest.approx(paired.find_mcnemar_p(gained, lost))
        low, high = paired.find_interval(gained, lost, count)
        assert (found.low, found.high) == pytest.approx((low * scale, high * scale))
        assert found.low < found.value < found.high


def test_signs_are_those_of_scipy():
    """Enumerated for few changes, and a normal sum for many."""
    rng = np.random.default_rng(3)
    few = rng.normal(size=9)
    test = stats.permutation_test((few,), np.sum, permutation_type="samples", n_resamples=2**9)
    assert paired.find_flip_p([*few, 0.0]) == pytest.approx(test.pvalue)
    many = rng.normal(size=200)
    expected = 2 * stats.norm.sf(abs(many.sum()) / math.sqrt((many**2).sum()))
    assert paired.find_flip_p(many) == pytest.approx(expected)
    edge = [1.0] * 12 + [-1.0] * 4
    assert paired.find_flip_p([*edge, 1.0]) == pytest.approx(paired.find_flip_p(edge), abs=0.06)


def test_files_add_up():
    """The variance of a sum over two files is that of both, and so is its middle."""
    rng = np.random.default_rng(4)
    sources = [paired.Source(rng.normal(size=size) / 50, 0.1) for size in (30, 70)]
    both = paired.compare_sums(sources)
    alone = [paired.compare_sums([source]) for source in sources]
    assert both.value == pytest.approx(sum(one.value for one in alone))
    assert both.low + both.high == pytest.approx(sum(one.low + one.high for one in alone))
    reaches = [one.high - one.low for one in alone]
    assert both.high - both.low == pytest.approx(math.hypot(*reaches))


def test_rows_that_stand_in_two_tasks_are_added_first():
    """The error of a sum over one file is that of the sums of its rows, and files are apart."""
    rng = np.random.default_rng(0)
    first, second, other = rng.normal(size=(3, 50))
    rows_of = {
        "one": [dict(enumerate(first / 50)), dict(enumerate(second / 50))],
        "other": [dict(enumerate(other / 50))],
    }
    expected = ((first + second).var(ddof=1) + other.var(ddof=1)) / 50
    assert paired.find_stderr_of_sum(rows_of) == pytest.approx(math.sqrt(expected))


def test_only_what_both_were_asked_is_compared():
    """A question is known by its row and its texts, and a task by its name."""
    old = make_task("copa", [1, 0, 0, 1, None, 1])
    new = make_task("copa", [0, 1, 1, None, 1, 1])
    changed = list(new.answers)
    changed[2] = changed[2]._replace(key="other words")
    new = new._replace(answers=changed)
    alone = make_task("boolq", [1])
    compared, apart = compare_tasks({"copa": old, "piqa": alone}, [new, alone])
    assert apart == ["piqa", "boolq"] and len(compared) == 1
    assert compared[0].paired.questions == 3 and compared[0].apart == 4
    assert compared[0][:4] == ("copa", "acc", 2 / 3, 2 / 3)
    assert compared[0].paired[1:3] == (1, 1) and compared[0].paired.difference.p == 1
    lost = make_task("copa", [1])._replace(answers=[Answer(1, "other", (True,))])
    assert compare_tasks({"copa": old}, [lost]) == ([], ["copa"])


def test_means_of_core_are_compared_row_by_row():
    """Two tasks of one file share their rows: the error is that of the rows' sums."""
    rng = np.random.default_rng(1)
    names = ("hellaswag_zeroshot", "hellaswag", "copa")
    old, new, gains = [], [], []
    for name in names:
        task = BY_NAME[name]
        before, after = rng.integers(0, 2, (2, 40))
        base = task.baseline / 100
        old.append(make_task(name, before, task.file, base))
        new.append(make_task(name, after, task.file, base))
        gains.append((after - before) / (1 - base))
    found = core_mean.compare_core_means(old, new[::-1])
    assert found.value == pytest.approx(np.mean(gains))
    bases = [1 / (1 - task.baseline) / 120 for task in old]
    rows = paired.Source((gains[0] + gains[1]) / 120, bases[0] + bases[1])
    expected = paired.compare_sums([rows, paired.Source(gains[2] / 120, bases[2])])
    assert found == pytest.approx(expected)
    before, after = (core_mean.find_core_mean(tasks) for tasks in (old, new))
    assert after.value - before.value == pytest.approx(found.value)
    assert core_mean.compare_core_means(old[:1], new[2:]) is None
    same = core_mean.compare_core_means(old, old)
    assert (same.value, same.p) == (0, 1) and same.low == pytest.approx(-same.high)
    assert same.high > 0.01
    one = [make_task("copa", [right], "copa") for right in (0, 1)]
    assert core_mean.compare_core_means(one[:1], one[1:]).p == 1
    namesake = old[0]._replace(metrics=("exact_match",))
    assert core_mean.compare_core_means([namesake], new[:1]) is None
