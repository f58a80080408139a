"""How well labels are told apart: accuracy, macro-F1, confusion, and calibration.

Letters: N rows, L labels, R resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 15  # of the expected calibration error, as Guo et al. 2017 (arXiv:1706.04599) have them
RESAMPLES = 1000
LEVEL = 0.95  # of the intervals


class Measured(NamedTuple):
    """What was measured of rows whose label is known.

    `values` has accuracy, macro_f1 and ece, and `intervals` the bounds of each. `confusion` counts
    rows [L, L] by their label and by the label that was chosen. `not_finite` counts rows whose
    probabilities are no numbers. They are left out of everything else.
    """

    labels: tuple[str, ...]
    rows: int
    not_finite: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    confusion: np.ndarray

    def to_json(self) -> dict:
        """Values for JSON, which has no NaN: it becomes None."""
        intervals = {name: list(map(none_if_nan, own)) for name, own in self.intervals.items()}
        return {
            "labels": list(self.labels),
            "rows": self.rows,
            "not_finite": self.not_finite,
            **{name: none_if_nan(value) for name, value in self.values.items()},
            "intervals": intervals,
            "confusion": self.confusion.tolist(),
        }


def none_if_nan(value: float) -> float | None:
    return value if math.isfinite(value) else None


def count_confusion(gold: np.ndarray, chosen: np.ndarray, labels: int) -> np.ndarray:
    """Counts [L, L] of rows by label and by chosen label."""
    return np.bincount(gold * labels + chosen, minlength=labels**2).reshape(labels, labels)


def find_macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 of the labels that occur, as a row's label or as the chosen one."""
    right = np.diag(confusion)
    sizes = confusion.sum(0) + confusion.sum(1)
    occurs = sizes > 0
    return float((2 * right[occurs] / sizes[occurs]).mean()) if occurs.any() else math.nan


def find_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean distance of confidence and accuracy over BINS bins of equal width.

    `confidence` is the probability of the chosen label [N], and `right` [N] is whether it is the
    row's.
    """
    # A bin has its upper edge, so that a confidence of 1 is in the last one.
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    sums = np.bincount(places, weights=right - confidence, minlength=BINS)
    return float(np.abs(sums).sum() / len(right)) if len(right) else math.nan


def measure_rows(gold: np.ndarray, chosen: np.ndarray, confidence: np.ndarray, labels: int) -> dict:
    """The three values of rows."""
    confusion = count_confusion(gold, chosen, labels)
    right = (gold == chosen).astype(float)
    return {
        "accuracy": float(right.mean()) if len(right) else math.nan,
        "macro_f1": find_macro_f1(confusion),
        "ece": find_calibration_error(confidence, right),
    }


def find_bounds(drawn: Sequence[float], sides: tuple[float, float]) -> tuple[float, float]:
    """The quantiles of what was drawn, NaN if nothing was."""
    if not drawn:
        return math.nan, math.nan
    low, high = np.quantile(drawn, sides)
    return float(low), float(high)


def measure_classification(
    labels: Sequence[str],
    gold: np.ndarray,
    chosen: np.ndarray,
    confidence: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Measured:
    """What rows with known labels tell of a classifier.

    `gold` and `chosen` [N] are places in `labels`, and `confidence` [N] is the probability of the
    chosen one. Intervals come from resampled rows, drawn from `seed`.
    """
    finite = np.isfinite(confidence)
    not_finite = int((~finite).sum())
    gold = gold[finite]
    chosen = chosen[finite]
    confidence = confidence[finite]
    values = measure_rows(gold, chosen, confidence, len(labels))

    draw = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(resamples if len(gold) else 0):
        rows = draw.integers(0, len(gold), len(gold))
        own = measure_rows(gold[rows], chosen[rows], confidence[rows], len(labels))
        for name, value in own.items():
            drawn[name].append(value)
    sides = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    intervals = {name: find_bounds(own, sides) for name, own in drawn.items()}
    confusion = count_confusion(gold, chosen, len(labels))
    return Measured(tuple(labels), len(gold), not_finite, values, intervals, confusion)


def tabulate_confusion(measured: Measured) -> list[tuple[str, ...]]:
    """Rows of cells: a header of the chosen labels, then a line for each label of rows."""
    header = ("label \\ chosen", *measured.labels)
    lines = zip(measured.labels, measured.confusion, strict=True)
    return [header, *((label, *map(str, counts)) for label, counts in lines)]
