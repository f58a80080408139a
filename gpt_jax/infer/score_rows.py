"""Requests as rows: where several continue one context, a row reads the context once.

Each continuation is a segment of its own, which sees itself and the context, and its positions go
on from the context. This is the tree attention of speculative decoding (Miao et al. 2023,
arXiv:2305.09781) with a tree of depth one.

Shapes: B rows, T tokens that are read, S targets.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.infer.prompts import SMALLEST_BUCKET, bucket
from gpt_jax.infer.requests import Fitted

CONTEXT = 1  # the segment of a row's context


class Row(NamedTuple):
    """What a row reads, and what is scored of it.

    `numbers` are its requests. Their targets stand one after another. `places` tells for each
    target after which token of the row it comes.
    """

    numbers: list[int]
    tokens: np.ndarray  # int32 [T]
    segment: np.ndarray  # int32 [T]
    position: np.ndarray  # int32 [T]
    places: np.ndarray  # int32 [S]
    targets: np.ndarray  # int32 [S]


def can_branch(model: config.Model) -> bool:
    """Whether several continuations may stand in one row.

    A window counts places of the row, and smear looks at the place before. Either would take a
    neighbour's tokens for those of the context.
    """
    has_window = any(spec.window for spec in config.layer_specs(model))
    return not has_window and not model.smear


def group_by_context(fitted: Sequence[Fitted], model: config.Model) -> list[list[int]]:
    """The numbers of all requests. Those of equal contexts stand together if they may branch."""
    groups: dict[object, list[int]] = {}
    for number, request in enumerate(fitted):
        is_shared = can_branch(model) and not request.cut
        key = split(request)[0].tobytes() if is_shared else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def make_rows(
    fitted: Sequence[Fitted], groups: Sequence[list[int]], longest: int, before: int = 0
) -> list[Row]:
    """Rows of requests by their contexts. They share rows where that saves tokens.

    The first `before` ids of each context are not read.
    """
    return [
        make_row(fitted, part, before)
        for numbers in groups
        for part in share_rows(fitted, numbers, longest, before)
    ]


def list_lengths(
    fitted: Sequence[Fitted], groups: Sequence[list[int]], longest: int, before: int = 0
) -> list[int]:
    """The padded lengths of the rows that `make_rows` makes."""
    return [
        padded(measure(fitted, part, before), longest)
        for numbers in groups
        for part in share_rows(fitted, numbers, longest, before)
    ]


def share_rows(
    fitted: Sequence[Fitted], numbers: list[int], longest: int, before: int
) -> Iterator[list[int]]:
    """Parts of `numbers` that stand in a row each. One joins a row if this saves padded tokens."""

    def measure_padded(numbers):
        return padded(measure(fitted, numbers, before), longest)

    part: list[int] = []
    for number in numbers:
        together = measure(fitted, [*part, number], before)
        apart = measure_padded(part) + measure_padded([number])
        if part and (together > longest or padded(together, longest) >= apart):
            yield part
            part = []
        part.append(number)
    yield part


def padded(size: int, longest: int) -> int:
    """The length of the bucket of a row of `size`."""
    return min(bucket(size, SMALLEST_BUCKET), longest)


def measure(fitted: Sequence[Fitted], numbers: list[int], before: int = 0) -> int:
    """Places that a row of these requests needs, for what it reads and for its targets."""
    if not numbers:
        return 0
    context = len(split(fitted[numbers[0]])[0]) - before
    targets = sum(fitted[number].count for number in numbers)
    return max(context + targets - len(numbers), targets)


def split(request: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """(context, continuation)."""
    at = len(request.ids) - request.count
    return request.ids[:at], request.ids[at:]


def make_row(fitted: Sequence[Fitted], numbers: list[int], before: int) -> Row:
    """The row of requests that have one context, after the first `before` ids of it.

    The last token of each request is predicted alone.
    """
    context = split(fitted[numbers[0]])[0][before:]
    tokens = [context]
    segments = [np.full(len(context), CONTEXT)]
    positions = [before + np.arange(len(context))]
    places = []
    targets = []

    size = len(context)
    for segment, number in enumerate(numbers, CONTEXT + 1):
        continuation = split(fitted[number])[1]
        read = np.arange(len(continuation) - 1)
        tokens.append(continuation[:-1])
        segments.append(np.full(len(read), segment))
        positions.append(before + len(context) + read)
        places += [[len(context) - 1], size + read]
        targets.append(continuation)
        size += len(read)

    columns = tokens, segments, positions, places, targets
    return Row(numbers, *(np.concatenate(parts).astype(np.int32) for parts in columns))
