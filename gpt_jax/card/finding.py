"""What one check has found, and why another could not be made."""

import math
from collections.abc import Iterable
from typing import NamedTuple

PASS = "pass"
FAIL = "FAIL"
NOT_CHECKED = "not checked"


class Result(NamedTuple):
    """What a check gives: whether it holds, and its figure in words."""

    holds: bool
    figure: str


class Finding(NamedTuple):
    """A line of a card. `verdict` is PASS, FAIL or NOT_CHECKED; `how` says what was done."""

    name: str
    verdict: str
    figure: str
    how: str


class CannotCheckError(Exception):
    """A check cannot be made, for a reason that the card shows. It is neither a pass nor a fail."""


def find_worst(differences: Iterable[float]) -> float:
    """The largest difference. NaN counts as infinite, so that it fails."""
    return max(value if math.isfinite(value) else math.inf for value in differences)
