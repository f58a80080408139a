"""Texts that many requests begin with, such as the examples before each question of a task.

A device reads such a text once and keeps its keys and values. The rows of the requests then begin
after it. The texts are found in the sorted contexts, where those that begin alike are neighbours.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.infer.prompts import SMALLEST_BUCKET
from gpt_jax.infer.requests import Fitted
from gpt_jax.infer.score_rows import (
    Row,
    can_branch,
    group_by_context,
    list_lengths,
    make_rows,
    padded,
    split,
)

# Tokens of a batch behind a text, for each part of the mesh that has rows of its own. They are
# fewer than elsewhere, because the rows of one text alone fill a batch.
TOKENS = 1 << 11
# What a token behind a text costs, in tokens of a plain row. Its attention reaches over the whole
# padded text, where that of a plain row ends at the token.
DEARER = 1.25
# The most lengths of texts that are told apart in the search.
LEVELS = 256


class Group(NamedTuple):
    """Rows that begin after `prefix`, ids [T]. It is empty for rows that hold whole contexts."""

    prefix: np.ndarray  # int32
    rows: list[Row]


class Cover(NamedTuple):
    """A way to read some contexts, and the tokens that it costs.

    `shared` has pairs (length of the common text, contexts), and `alone` the other contexts. A
    context is the numbers of its requests.
    """

    tokens: float
    shared: list[tuple[int, list[list[int]]]]
    alone: list[list[int]]


def make_groups(
    fitted: Sequence[Fitted], model: config.Model, multiple: int, has_prefixes: bool
) -> list[Group]:
    """Rows of all requests, those without a common text first.

    `multiple` counts the parts of the mesh that have rows of their own. Each of them reads each
    common text. Without `has_prefixes` no text is taken out of the rows.
    """
    contexts = group_by_context(fitted, model)
    cover = Cover(0, [], contexts)
    if has_prefixes and can_branch(model):
        cover = choose_prefixes(fitted, contexts, model.max_seq, multiple)

    longest = model.max_seq
    groups = [Group(np.zeros(0, np.int32), make_rows(fitted, cover.alone, longest))]
    for size, members in cover.shared:
        prefix = fitted[members[0][0]].ids[:size]
        groups.append(Group(prefix, make_rows(fitted, members, longest, size)))
    return [group for group in groups if group.rows]


def choose_prefixes(
    fitted: Sequence[Fitted], contexts: list[list[int]], longest: int, multiple: int
) -> Cover:
    """The cheapest way to read the contexts, by the tokens of `count_behind`."""
    texts = [split(fitted[numbers[0]])[0] for numbers in contexts]
    # Big-endian bytes are in the order of the ids.
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())
    common = [count_common(texts[a], texts[b]) for a, b in itertools.pairwise(order)]
    step = max(SMALLEST_BUCKET, longest // LEVELS)

    def cover(start: int, stop: int) -> Cover:
        members = [contexts[i] for i in order[start:stop]]
        if len(members) == 1:
            return Cover(sum(list_lengths(fitted, members, longest)), [], members)

        # Neighbours that have no more in common than the whole run are cut apart.
        size = min(common[start : stop - 1])
        cuts = [i + 1 for i in range(start, stop - 1) if common[i] // step == size // step]
        edges = [start, *cuts, stop]
        apart = join([cover(a, b) for a, b in itertools.pairwise(edges)])

        if size < SMALLEST_BUCKET:
            return apart
        lengths = list_lengths(fitted, members, longest, size)
        together = DEARER * count_behind(size, lengths, longest, multiple)
        return Cover(together, [(size, members)], []) if together < apart.tokens else apart

    return cover(0, len(order)) if order else Cover(0, [], [])


def join(parts: Sequence[Cover]) -> Cover:
    """What several covers are together."""
    shared = [pair for part in parts for pair in part.shared]
    alone = [context for part in parts for context in part.alone]
    return Cover(sum(part.tokens for part in parts), shared, alone)


def count_common(text: np.ndarray, other: np.ndarray) -> int:
    """How many first ids two contexts have in common, the last id of each left out.

    The last id of a context is read in the row, because the first target comes after it.
    """
    size = min(len(text), len(other)) - 1
    differs = text[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def count_behind(prefix: int, lengths: Sequence[int], longest: int, multiple: int) -> int:
    """Tokens that are read for rows of padded `lengths` behind a text, padding of batches included.

    Each of `multiple` parts reads the text once.
    """
    tokens = multiple * padded(prefix, longest)
    for length, rows in Counter(lengths).items():
        count = multiple * count_rows(length)
        tokens += -(-rows // count) * count * length
    return tokens


def count_rows(length: int) -> int:
    """Rows of `length` in a batch behind a text, for each part of the mesh."""
    return max(1, TOKENS // length)
