"""Rows as batches of few shapes.

Rows are sorted by length into buckets. These are the powers of two from 16 up to the context. All
batches of a bucket have one shape, behind a text that many requests begin with or not.

Shapes: B rows, T tokens that are read, S places that are scored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.infer.prefixes import Group, count_rows
from gpt_jax.infer.prompts import bucket
from gpt_jax.infer.score_rows import CONTEXT, Row, padded

# Tokens of a batch for each part of the mesh that has rows of its own.
TOKENS = 1 << 14
# Logits that a device makes at once. In float32 they take 256 MiB.
LOGITS = 1 << 26
# The most places of a chunk. What a batch does not need is left out in chunks.
CHUNK = 32


class Batch(NamedTuple):
    """Rows of one program, padded to it.

    `columns` are what the model reads, each [B, T]. `places` [B, S] tells after which token of its
    row each target [B, S] comes. `prefix` is the text that the rows are behind, or empty.
    """

    rows: list[Row]
    columns: dict[str, np.ndarray]  # int32, and bool
    places: np.ndarray  # int32
    targets: np.ndarray  # int32
    needed: int  # chunks
    chunk: int
    prefix: np.ndarray  # int32


def choose_rows(requests: int, length: int, multiple: int) -> int:
    """Rows of a bucket's batches: TOKENS for each of `multiple` parts, or fewer for few requests.

    They are a multiple of `multiple`.
    """
    most = bucket(max(1, TOKENS // length + 1)) // 2 or 1
    return multiple * min(max(1, most), bucket(-(-requests // multiple)))


def choose_chunk(rows: int, length: int, vocab: int) -> int:
    """Places of a row whose logits are made at once, a power of two."""
    fitting = max(1, LOGITS // (rows * vocab))
    return min(bucket(fitting + 1) // 2, CHUNK, bucket(length))


def make_batches(groups: Sequence[Group], model: config.Model, multiple: int) -> Iterator[Batch]:
    """Batches of each group in turn, by bucket, the longest first.

    Within a bucket rows of many targets stand together. The order does not depend on the process.
    All batches of a bucket have one shape, so that it compiles once, and once more for batches
    behind a prefix.
    """
    for group in groups:
        is_behind = len(group.prefix) > 0
        needs_columns = is_behind or len(group.rows) < sum(len(row.numbers) for row in group.rows)

        for length, waiting in sort_by_length(group, model.max_seq):
            count = choose_rows(len(waiting), length, multiple)
            if is_behind:
                count = multiple * count_rows(length)
            chunk = choose_chunk(count // multiple, length, model.vocab)
            for start in range(0, len(waiting), count):
                part = waiting[start : start + count]
                yield _make_batch(part, (count, length), chunk, needs_columns, group.prefix)


def sort_by_length(group: Group, longest: int) -> list[tuple[int, list[Row]]]:
    """Rows by the lengths of their buckets, the longest first, and by how much is scored."""
    by_length: dict[int, list[Row]] = {}
    for row in sorted(group.rows, key=lambda row: -len(row.targets)):
        length = padded(max(len(row.tokens), len(row.targets)), longest)
        by_length.setdefault(length, []).append(row)
    return sorted(by_length.items(), reverse=True)


def _make_batch(
    rows: list[Row], shape: tuple[int, int], chunk: int, has_branches: bool, prefix: np.ndarray
) -> Batch:
    """Pads rows to `shape` [B, T]. Empty rows read one token."""
    names = ("tokens", "segment", "position") if has_branches else ("tokens", "segment")
    columns = {name: np.zeros(shape, np.int32) for name in names}
    columns["segment"][:, 0] = CONTEXT
    room = shape[0], -(-shape[1] // chunk) * chunk
    places = np.zeros(room, np.int32)
    targets = np.zeros(room, np.int32)

    for number, row in enumerate(rows):
        for name in names:
            columns[name][number, : len(row.tokens)] = getattr(row, name)
        places[number, : len(row.places)] = row.places
        targets[number, : len(row.targets)] = row.targets

    if has_branches:
        columns["common"] = columns["segment"] == CONTEXT
    else:
        columns["segment"] = np.minimum(columns["segment"], CONTEXT)
    needed = -(-max(len(row.targets) for row in rows) // chunk)
    return Batch(rows, columns, places, targets, needed, chunk, prefix)
