"""Documents to rows without cutting them (called by rows): who shares a row with whom, planned once
and before any slicing, so that row r is the same for every reader and any row is found at once.

Plans are in tokens. A row holds up to `capacity` = T + 1 of them, T inputs and the last target. A
document that does not fit is cut into rows of its own, each beginning with the last token of the
one before, and its rest shares a row like any short document, so that no token is lost and each is
predicted once (Ding et al. 2024, "Fewer truncations improve language modeling"; where documents are
not kept apart, the token that is there twice is predicted twice). 16 bytes a document are held in
memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpt_jax.data.stream.order import permute

# pieces that are packed among themselves: enough for full rows, and many blocks go side by side
BLOCK = 1024
BLOCKS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Plan:
    """Row r holds the pieces `first[r]` to `first[r + 1]` one after the other."""

    first: np.ndarray  # int64 [rows + 1]
    starts: np.ndarray  # int64 [pieces]: the place of a piece's first token
    sizes: np.ndarray  # int32 [pieces], in tokens

    @property
    def rows(self) -> int:
        return len(self.first) - 1


def cut(offsets: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts of full rows, starts of pieces, sizes of pieces) of documents that begin at
    `offsets` (int64 [N + 1])."""
    begins, sizes = offsets[:-1], np.diff(offsets)
    full = np.where(sizes > capacity, (sizes - 1) // (capacity - 1), 0)
    nth = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    whole = np.repeat(begins, full) + nth * (capacity - 1)
    rest = sizes - full * (capacity - 1)
    left = (rest > 1) | (
        (full == 0) & (rest > 0)
    )  # the one token that a full row ends with has been predicted
    return whole, (begins + full * (capacity - 1))[left], rest[left].astype(np.int32)


def first_fit(room: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The first row of each block with room: room int32 [G, M], size [G] -> int64 [G]."""
    return np.argmax(room >= size[:, None], axis=1)


def best_fit(room: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The row of each block that `size` fills best, the first of equals."""
    left = room - size[:, None]
    return np.argmin(np.where(left < 0, np.iinfo(np.int32).max, left), axis=1)


def place(sizes: np.ndarray, capacity: int, choose: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(row of every piece [G, K], rows used [G]) of G blocks of K pieces (size 0: none), packed
    side by side in the order given."""
    groups, pieces = sizes.shape
    room = np.full((groups, pieces + 1), capacity, np.int32)
    rows, used, every = (
        np.zeros((groups, pieces), np.int64),
        np.zeros(groups, np.int64),
        np.arange(groups),
    )
    for i in range(pieces):
        size = sizes[:, i]
        rows[:, i] = row = choose(room[:, : int(used.max()) + 1], size)
        room[every, row] -= size
        used = np.maximum(used, (row + 1) * (size > 0))
    return rows, used


def _in_arrival_order(sizes: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(sizes.shape[1]), sizes.shape)


def _longest_first(sizes: np.ndarray) -> np.ndarray:
    return np.argsort(-sizes, axis=1, kind="stable")


# name -> (order of a block's pieces, choice of the row): documents as they come into the first row
# with room (Johnson 1973), or the longest first into the row they fill best.
PACKINGS = {"first_fit": (_in_arrival_order, first_fit), "best_fit": (_longest_first, best_fit)}


def plan(offsets: np.ndarray, capacity: int, how: str, seed: int) -> Plan:
    """Rows of up to `capacity` tokens for documents at `offsets` (int64 [N + 1]), those that
    share a row drawn from all over the corpus by `seed`. A pure function of its arguments."""
    arrange, choose = PACKINGS[how]
    whole, begins, sizes = cut(offsets, capacity)
    count, done = len(begins), len(whole)
    starts, lengths, row_sizes = (
        [whole],
        [np.full(done, capacity, np.int32)],
        [np.ones(done, np.int64)],
    )
    step = BLOCK * BLOCKS_AT_ONCE
    for at in range(0, count, step):
        index = np.arange(at, min(at + step, count))
        index = permute(index, count, seed, np.zeros(len(index), np.int64))
        blocks = -(-len(index) // BLOCK)
        padded = np.full(blocks * BLOCK, -1)
        padded[: len(index)] = index
        index = padded.reshape(blocks, BLOCK)
        size = np.where(index < 0, 0, sizes[index])
        order = arrange(size)
        index, size = np.take_along_axis(index, order, 1), np.take_along_axis(size, order, 1)
        rows, used = place(size, capacity, choose)
        rows += (np.cumsum(used) - used)[:, None]
        there = index >= 0
        rows, index, size = rows[there], index[there], size[there]
        order = np.argsort(rows, kind="stable")
        starts.append(begins[index[order]]), lengths.append(size[order])
        row_sizes.append(np.bincount(rows, minlength=int(used.sum())))
    return Plan(
        np.cumsum(np.concatenate([[0], *row_sizes])),
        np.concatenate(starts),
        np.concatenate(lengths),
    )


def at_documents(offsets: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [rows]: where rows of T = `seq_len` begin that all begin with a document: the next
    one begins with the first document that has not begun inside the inputs of this one. Empty
    documents at the end begin none."""
    offsets = offsets[: np.searchsorted(offsets, offsets[-1]) + 1]
    following = np.searchsorted(offsets[:-1], offsets[:-1] + seq_len, "left")
    rows, document, step = [], 0, 1 << 20
    while document < len(following):  # plain integers: a numpy scalar costs three times as much
        base = document
        chunk = following[base : base + step].tolist()
        while document - base < len(chunk):
            rows.append(document)
            document = chunk[document - base]
    return offsets[np.array(rows, np.int64)]
