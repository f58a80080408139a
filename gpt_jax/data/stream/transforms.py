"""Rearranges the documents inside a row before the row becomes columns.

The functions are pure in the row, the seed and the example's number, so a batch that is made again
is the same batch. A row has T + 1 ids and marks where a document begins. Its pieces are the runs
between marks.
"""

import itertools

import numpy as np

from gpt_jax.data.stream.order import random_bits
from gpt_jax.data.stream.rows import Buffer

# The fewest tokens of a piece that is rearranged. Three of them make room for the sentinels.
SHORTEST = 10


def shuffle_documents(buffer: Buffer, seed: int, index: np.ndarray) -> Buffer:
    """The pieces of each row in a random order, padding last.

    `index` has the numbers of the examples, int64 [N].
    """
    piece = np.cumsum(buffer.begins, axis=1)
    keys = random_bits(
        seed, index[:, None], np.arange(piece.max(initial=0) + 1)[None]
    ) >> np.uint64(1)
    keys = np.where(buffer.inside, np.take_along_axis(keys, piece, 1), np.uint64(2**64 - 1))
    order = np.argsort(keys, axis=1, kind="stable")
    moved = Buffer(*(np.take_along_axis(column, order, 1) for column in buffer))

    # A piece that was cut has no mark of its own, so the change of pieces marks it.
    moved.begins[:, 1:] |= np.diff(np.take_along_axis(piece, order, 1), axis=1) != 0
    moved.begins[:, 1:] &= moved.inside[:, 1:]
    return moved


def fill_in_the_middle(
    buffer: Buffer,
    seed: int,
    index: np.ndarray,
    rate: float,
    spm: float,
    sentinels,
    eot,
    begin=None,
) -> Buffer:
    """Rows whose pieces are, in the part `rate`, rearranged as (prefix, suffix, middle).

    The part `spm` of those becomes (suffix, prefix, middle). `sentinels` are the ids of
    <|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>. They replace the piece's first three tokens,
    so that its length and its end-of-text token `eot` stay. A piece that starts with the id `begin`
    keeps it there. Pieces under SHORTEST tokens do not change. The method is that of Bavarian et
    al. 2022, "Efficient training of language models to fill in the middle", on the pieces of a
    packed row.
    """
    ids = buffer.ids.copy()
    pre, suf, mid = (np.array([i], ids.dtype) for i in sentinels)
    for row, number in enumerate(index):
        length = int(buffer.inside[row].sum())
        edges = [0, *(np.flatnonzero(buffer.begins[row, 1:length]) + 1).tolist(), length]
        draws = random_bits(seed, np.array([number]), np.arange(4 * len(edges)))
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            start += int(begin is not None and ids[row, start] == begin)
            if stop - start < SHORTEST:
                continue
            chance, order, a, b = draws[4 * i : 4 * i + 4].tolist()
            if chance >= rate * 2.0**64:
                continue
            end = stop - int(eot is not None and ids[row, stop - 1] == eot)
            body = ids[row, start + 3 : end].copy()
            a, b = sorted((a % (len(body) + 1), b % (len(body) + 1)))
            prefix = body[:a]
            middle = body[a:b]
            suffix = body[b:]
            if order < spm * 2.0**64:
                parts = (pre, suf, suffix, mid, prefix)
            else:
                parts = (pre, prefix, suf, suffix, mid)
            ids[row, start:end] = np.concatenate([*parts, middle])
    return buffer._replace(ids=ids)
