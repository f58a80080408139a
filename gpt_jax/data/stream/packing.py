"""Plans which documents share a row, so that documents are not cut where they fit.

A corpus is planned once, before it is split over processes. Row r is therefore the same for every
reader, and any row is reached at once. A plan takes 16 bytes of memory a document.

Sizes are in tokens. A row holds up to `capacity` = T + 1 tokens: T inputs and the last target. A
document that does not fit is cut into full rows of its own. Each of them begins with the last token
of the one before. The rest of the document shares a row as a short document does. So no token is
lost, and each is predicted once (Ding et al. 2024, "Fewer truncations improve language modeling").
Without a document mask the repeated token is predicted twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpt_jax.data.stream.order import permute

# The pieces of a block are packed among themselves. 1024 are enough for full rows.
BLOCK = 1024

# Numpy packs this many blocks side by side.
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
    """(starts of full rows, starts of pieces, sizes of pieces) of documents.

    The documents begin at `offsets`, int64 [N + 1].
    """
    begins = offsets[:-1]
    sizes = np.diff(offsets)
    full = np.where(sizes > capacity, (sizes - 1) // (capacity - 1), 0)
    nth = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    whole = np.repeat(begins, full) + nth * (capacity - 1)

    # A rest of one token is no piece, because the full row before it has predicted that token.
    rest = sizes - full * (capacity - 1)
    is_piece = (rest > 1) | ((full == 0) & (rest > 0))
    starts = (begins + full * (capacity - 1))[is_piece]
    return whole, starts, rest[is_piece].astype(np.int32)


def first_fit(room: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The first row of each block with room: room int32 [G, M], size [G] -> int64 [G]."""
    return np.argmax(room >= size[:, None], axis=1)


def best_fit(room: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The row of each block that `size` fills best, the first of equals."""
    left = room - size[:, None]
    return np.argmin(np.where(left < 0, np.iinfo(np.int32).max, left), axis=1)


def place(sizes: np.ndarray, capacity: int, choose: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(row of every piece [G, K], rows used [G]) of G blocks of K pieces.

    The blocks are packed side by side, each in the order of its pieces. Size 0 means no piece.
    """
    groups, pieces = sizes.shape
    room = np.full((groups, pieces + 1), capacity, np.int32)
    rows = np.zeros((groups, pieces), np.int64)
    used = np.zeros(groups, np.int64)
    every = np.arange(groups)

    for i in range(pieces):
        size = sizes[:, i]
        row = choose(room[:, : int(used.max()) + 1], size)
        rows[:, i] = row
        room[every, row] -= size
        used = np.maximum(used, (row + 1) * (size > 0))
    return rows, used


def _in_arrival_order(sizes: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(sizes.shape[1]), sizes.shape)


def _longest_first(sizes: np.ndarray) -> np.ndarray:
    return np.argsort(-sizes, axis=1, kind="stable")


# Name -> (order of a block's pieces, choice of the row). `first_fit` puts documents as they come
# into the first row with room (Johnson 1973). `best_fit` puts the longest first into the row that
# it fills best.
FITS = {"first_fit": (_in_arrival_order, first_fit), "best_fit": (_longest_first, best_fit)}


def plan(offsets: np.ndarray, capacity: int, how: str, seed: int) -> Plan:
    """Rows of up to `capacity` tokens for documents at `offsets`, int64 [N + 1].

    Documents that share a row come from all over the corpus, as `seed` decides. The plan is a
    pure function of the arguments.
    """
    arrange, choose = FITS[how]
    whole, begins, sizes = cut(offsets, capacity)
    count = len(begins)
    starts = [whole]
    lengths = [np.full(len(whole), capacity, np.int32)]
    row_sizes = [np.ones(len(whole), np.int64)]

    step = BLOCK * BLOCKS_AT_ONCE
    for at in range(0, count, step):
        index = np.arange(at, min(at + step, count))
        index = permute(index, count, seed, np.zeros(len(index), np.int64))

        # The last block is filled up with -1, which is no piece and has size 0.
        blocks = -(-len(index) // BLOCK)
        padded = np.full(blocks * BLOCK, -1)
        padded[: len(index)] = index
        index = padded.reshape(blocks, BLOCK)
        size = np.where(index < 0, 0, sizes[index])

        order = arrange(size)
        index = np.take_along_axis(index, order, 1)
        size = np.take_along_axis(size, order, 1)
        rows, used = place(size, capacity, choose)
        rows += (np.cumsum(used) - used)[:, None]

        is_piece = index >= 0
        rows = rows[is_piece]
        index = index[is_piece]
        size = size[is_piece]
        order = np.argsort(rows, kind="stable")
        starts.append(begins[index[order]])
        lengths.append(size[order])
        row_sizes.append(np.bincount(rows, minlength=int(used.sum())))

    return Plan(
        np.cumsum(np.concatenate([[0], *row_sizes])),
        np.concatenate(starts),
        np.concatenate(lengths),
    )


def at_documents(offsets: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 [rows]: where rows of T = `seq_len` begin if every row begins with a document.

    The next row begins with the first document that does not begin inside the inputs of this row.
    Empty documents at the end begin no row.
    """
    offsets = offsets[: np.searchsorted(offsets, offsets[-1]) + 1]
    following = np.searchsorted(offsets[:-1], offsets[:-1] + seq_len, "left")

    # The loop works on plain integers, because a numpy scalar costs three times as much. A chunk
    # of 2**20 of them at a time bounds the memory.
    step = 1 << 20
    rows = []
    document = 0
    while document < len(following):
        base = document
        chunk = following[base : base + step].tolist()
        while document - base < len(chunk):
            rows.append(document)
            document = chunk[document - base]
    return offsets[np.array(rows, np.int64)]
