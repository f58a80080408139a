"""Whether two models differ, from their answers to the same questions.

The test of a task is McNemar's, exact: only questions that one model alone answers right tell them
apart, and without a difference each falls to either side like a coin. It holds for few questions
too, and needs no draws. The interval is that of Agresti and Min (2005): half a question is added to
each of the four cells, so that it is honest for few questions and never empty.

A mean over tasks is compared in the same two ways, with what each question weighs in it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

QUANTILE = 1.959963984540054  # of the normal distribution, for an interval of 95 %
MOST_FLIPS = 16  # changes whose signs are enumerated: 2**16 sums take two milliseconds


class Difference(NamedTuple):
    """How much more one model has than another: a value, an interval of 95 %, a p-value."""

    value: float
    low: float
    high: float
    p: float


class Paired(NamedTuple):
    """A comparison of a task.

    `gained` counts the questions that only the new model has right, and `lost` those that only
    the old one has.
    """

    questions: int
    gained: int
    lost: int
    difference: Difference


def find_mcnemar_p(gained: int, lost: int) -> float:
    """The two-sided p-value: how often a fair coin falls at least as far from the middle."""
    count = gained + lost
    ways = 1
    total = 0
    for heads in range(min(gained, lost) + 1):
        total += ways
        ways = ways * (count - heads) // (heads + 1)
    return min(1.0, 2 * total / 2**count)


def find_interval(gained: int, lost: int, questions: int) -> tuple[float, float]:
    """The interval of 95 % for the difference of two rates, inside -1 to 1."""
    size = questions + 2
    middle = (gained - lost) / size
    spread = math.sqrt((gained + lost + 1) / size - middle**2) / math.sqrt(size)
    return max(-1.0, middle - QUANTILE * spread), min(1.0, middle + QUANTILE * spread)


def compare_answers(old: Sequence[bool], new: Sequence[bool]) -> Paired:
    """Compares two models on the same questions, in the same order."""
    pairs = list(zip(old, new, strict=True))
    gained = sum(is_new and not is_old for is_old, is_new in pairs)
    lost = sum(is_old and not is_new for is_old, is_new in pairs)
    low, high = find_interval(gained, lost, len(pairs))
    value = (gained - lost) / len(pairs)
    return Paired(
        len(pairs), gained, lost, Difference(value, low, high, find_mcnemar_p(gained, lost))
    )


class Source(NamedTuple):
    """What the questions of one file add to a difference.

    `changes` has it for each question, 0 if both models answer alike. `most` is the largest change
    that a question can make.
    """

    changes: Sequence[float]
    most: float


def find_flip_p(changes: Iterable[float]) -> float:
    """The two-sided p-value of a sum: how often it is as large if each sign is a coin's.

    Without a difference either model may be the better one at each question. All signs are
    enumerated for up to MOST_FLIPS changes. The sum of more is taken for normal.
    """
    sizes = np.array([change for change in changes if change], np.float64)
    if len(sizes) > MOST_FLIPS:
        return math.erfc(abs(sizes.sum()) / math.sqrt((sizes**2).sum() * 2))
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums + size, sums - size])
    # Equal sums of one set of numbers differ in their last digits.
    rounding = 1e-9 * np.abs(sizes).sum()
    return float((np.abs(sums) >= abs(sizes.sum()) - rounding).mean())


def compare_sums(sources: Sequence[Source]) -> Difference:
    """The difference that the questions of several files add up to.

    For one file whose questions weigh the same it is that of `compare_answers`, but for p of more
    than MOST_FLIPS changes.
    """
    value = math.fsum(change for source in sources for change in source.changes)
    middle = 0.0
    variance = 0.0
    for source in sources:
        count = len(source.changes)
        size = count + 2
        mean = math.fsum(source.changes) / size
        squares = math.fsum(change**2 for change in source.changes) + source.most**2
        middle += mean * count
        variance += (squares / size - mean**2) * count**2 / size
    reach = QUANTILE * math.sqrt(variance)
    p = find_flip_p(change for source in sources for change in source.changes)
    return Difference(value, middle - reach, middle + reach, p)


def add_rows(mappings: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """{row: what it adds in all of `mappings`}, as where one file is asked in two ways."""
    totals: dict[int, float] = {}
    for values in mappings:
        for row, value in values.items():
            totals[row] = totals.get(row, 0.0) + value
    return totals


def find_stderr_of_sum(rows_of: Mapping[str, Sequence[Mapping[int, float]]]) -> float:
    """The standard error of a sum over questions, by source.

    Each source has mappings of its rows to what they add. A row may stand in several of them, as
    where one file is asked in two ways. Rows are independent, and what one row adds in two
    mappings is not.
    """
    variance = 0.0
    for mappings in rows_of.values():
        totals = add_rows(mappings)
        count = len(totals)
        mean = math.fsum(totals.values()) / count
        squares = math.fsum((value - mean) ** 2 for value in totals.values())
        variance += squares * count / max(1, count - 1)
    return math.sqrt(variance)
