"""Tokens to rows, rows to numpy columns of B rows by T tokens (called by pipeline).

A row of PACKINGS finds training rows; `InOrder` reads held-out text once from front to back. Both give
a Buffer of T + 1 ids; the shift by one between `tokens` and `targets` happens in `columns` and
nowhere else.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.data.stream import packing
from gpt_jax.data.stream.order import permute, random_below
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import DataError, UsageError

Columns = dict[str, np.ndarray]


class Buffer(NamedTuple):
    """Rows before the shift, all [N, T + 1]."""

    ids: np.ndarray  # int32, 0 in padding
    begins: np.ndarray  # bool: a document, or a piece of one, begins here
    inside: np.ndarray  # bool: not padding


class Span(NamedTuple):
    """Part of a row that comes from one document."""

    column: int  # where in the row it begins
    size: int  # tokens
    document: int
    offset: int  # place of its first token in the document


def _begins(tokens: Tokens, starts: np.ndarray, length: int) -> np.ndarray:
    """bool [N, length]: where a document begins in what follows `starts`."""
    first = np.searchsorted(tokens.offsets, starts, "left")
    counts = np.searchsorted(tokens.offsets, starts + length - 1, "right") - first
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), bool)
    begins[row, tokens.offsets[first[row] + nth] - starts[row]] = True
    return begins


def contiguous(tokens: Tokens, starts: np.ndarray, length: int) -> Buffer:
    """What follows each of `starts` (int64 [N]); padding beyond the last token. DataError for a
    damaged token file."""
    ids = np.zeros((len(starts), length), tokens.dtype)
    there = np.clip(tokens.size - starts, 0, length)
    for row, start, count in zip(ids, starts.tolist(), there.tolist()):
        tokens.read(start, row[:count])
    return Buffer(
        ids.astype(np.int32), _begins(tokens, starts, length), np.arange(length) < there[:, None]
    )


def spans(tokens: Tokens, pieces: list[tuple[int, int]]) -> Iterator[Span]:
    """The documents of a row made of `pieces` (start, size), one after the other."""
    column = 0
    for start, size in pieces:
        document = int(np.searchsorted(tokens.offsets, start, "right")) - 1
        while size > 0:
            here = int(tokens.offsets[document])
            count = min(size, int(tokens.offsets[document + 1]) - start)
            if count:
                yield Span(column, count, document, start - here)
            column, start, size, document = (
                column + count,
                start + count,
                size - count,
                document + 1,
            )


def make_columns(buffer: Buffer, token_bytes: np.ndarray, document_mask: bool) -> Columns:
    """A Buffer of T + 1 ids as columns of T tokens.

    tokens, targets  int32 [N, T]    targets[i] follows tokens[i]; padding is 0 weight
    float32 [N, T]  1 where the target is to be predicted; 0 in padding, and if `document_mask` where the
                                     target begins another document
    bytes            int32 [N, T]    UTF-8 bytes of each predicted target, 0 elsewhere segment
    int32 [N, T]    only if `document_mask`: 1, 2, … by document within the row; 0 in padding position
    int32 [N, T]    only if `document_mask`: place in the document, from 0 where the document or the row
    begins
    """
    ids, begins, inside = buffer
    predicted, kept = inside[:, 1:], {}
    if document_mask:
        predicted = predicted & ~begins[:, 1:]
        here, place = inside[:, :-1], np.arange(ids.shape[1] - 1, dtype=np.int32)
        starts = begins[:, :-1].copy()
        starts[:, 0] = True
        segment = np.cumsum(starts, axis=1, dtype=np.int32)
        position = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
        kept = {"segment": segment * here, "position": position * here}
    targets = ids[
        :, 1:
    ].copy()  # contiguous here, off the main thread, so that the transfer need not copy
    return {
        "tokens": ids[:, :-1].copy(),
        "targets": targets,
        "weight": predicted.astype(np.float32),
        "bytes": token_bytes[targets] * predicted,
        **kept,
    }


class Window:
    """Rows at random places, with replacement, every place where T + 1 tokens exist as likely
    (nanoGPT's get_batch).

    `fill(indices)`: int64 [N] -> Buffer, a pure function of (seed, index). `count`: rows that hold
    as many tokens as the text. `lost`: tokens that no row of an epoch predicts. `filled`: the part
    of the rows' places that holds tokens.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, name: str = "the training text"):
        self.tokens, self.length, self.seed, self.name = tokens, seq_len + 1, seed, name
        self.lost, self.filled = 0, 1.0
        self._plan(seq_len)

    def _plan(self, seq_len: int) -> None:
        if self.tokens.size <= seq_len:
            raise UsageError(
                f"config.train.seq_len = {seq_len}: {self.name} has {self.tokens.size} tokens and a row "
                f"needs {seq_len + 1}; give more text or a shorter row"
            )
        self.count = (self.tokens.size - 1) // seq_len

    def _need_pairs(self) -> None:
        if np.diff(self.tokens.offsets).max() < 2:
            raise UsageError(
                f"config.data.packing: {self.name} has no document of two tokens, so there is nothing to "
                "predict; give other text, or config.data.packing=chunk"
            )

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Where rows begin, int64 [N]."""
        return random_below(self.tokens.size - self.length + 1, self.seed, indices)

    def fill(self, indices: np.ndarray) -> Buffer:
        return contiguous(self.tokens, self.starts(indices), self.length)

    def spans(self, index: int) -> list[Span]:
        """Where row `index` comes from."""
        start = int(self.starts(np.array([index]))[0])
        return list(spans(self.tokens, [(start, min(self.length, self.tokens.size - start))]))

    def _row(self, indices: np.ndarray) -> np.ndarray:
        """Each row once an epoch, in another random order each time."""
        return permute(indices % self.count, self.count, self.seed, indices // self.count)


class Chunk(Window):
    """Every token once an epoch: row r is tokens[r*T : r*T + T + 1], documents cut where a row
    ends. The tail that fills no row is lost."""

    def _plan(self, seq_len: int) -> None:
        super()._plan(seq_len)
        self.lost = self.tokens.size - 1 - self.count * seq_len

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return (self.length - 1) * self._row(indices)


class AtDocument(Window):
    """Every row begins with a document and goes on with those after it; what the last one has
    beyond the row is lost."""

    def _plan(self, seq_len: int) -> None:
        self._need_pairs()
        self._starts = packing.at_documents(self.tokens.offsets, seq_len)
        self.count = len(self._starts)
        ends = np.minimum(self._starts + seq_len, self.tokens.size - 1)
        predicted = int((ends - self._starts).sum())
        self.lost, self.filled = (
            self.tokens.size - 1 - predicted,
            predicted / (self.count * seq_len),
        )

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return self._starts[self._row(indices)]


class FirstFit(Window):
    """Whole documents, as many as fit in a row (see packing); the rest of the row is padding."""

    how = "first_fit"

    def _plan(self, seq_len: int) -> None:
        self._need_pairs()
        self.plan = packing.plan(self.tokens.offsets, self.length, self.how, self.seed)
        self.count = self.plan.rows
        self.filled = int(self.plan.sizes.sum(dtype=np.int64)) / (self.count * self.length)

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(start, size) of the pieces of row `row` of the plan."""
        part = slice(self.plan.first[row], self.plan.first[row + 1])
        return list(zip(self.plan.starts[part].tolist(), self.plan.sizes[part].tolist()))

    def fill(self, indices: np.ndarray) -> Buffer:
        ids = np.zeros((len(indices), self.length), self.tokens.dtype)
        begins, sizes = np.zeros(ids.shape, bool), np.zeros(len(indices), np.int64)
        for n, row in enumerate(self._row(indices).tolist()):
            at = 0
            for start, size in self.pieces(row):
                self.tokens.read(start, ids[n, at : at + size])
                begins[n, at] = True
                at += size
            sizes[n] = at
        return Buffer(ids.astype(np.int32), begins, np.arange(self.length) < sizes[:, None])

    def spans(self, index: int) -> list[Span]:
        return list(spans(self.tokens, self.pieces(int(self._row(np.array([index]))[0]))))


class BestFit(FirstFit):
    """The same with the longest documents first, each where it leaves least room."""

    how = "best_fit"


PACKINGS: dict[str, Callable] = {
    "window": Window,
    "chunk": Chunk,
    "document": AtDocument,
    "first_fit": FirstFit,
    "best_fit": BestFit,
}


class InOrder:
    """Held-out rows, sequential, the last one padded, so that every token is a target exactly
    once. The first token of the text has nothing before it and is no target (nor, if kept apart,
    the first of each document)."""

    def __init__(self, tokens: Tokens, seq_len: int, name: str = "the held-out text"):
        if tokens.size < 2:
            raise UsageError(
                f"{name} has {tokens.size} token and there is nothing to predict; hold out more "
                "(config.data.eval_fraction, --eval_fraction of prepare) or give config.data.eval_path"
            )
        self.tokens, self.length = tokens, seq_len + 1
        self.count = -(-(tokens.size - 1) // seq_len)

    def fill(self, indices: np.ndarray) -> Buffer:
        """Rows `indices`; those from `count` on are padding."""
        return contiguous(self.tokens, indices * (self.length - 1), self.length)


def check_ids(buffer: Buffer, tokens: Tokens, vocab: int) -> None:
    """DataError if there is an id that the tokenizer does not have."""
    # A flipped bit can make a negative of an id, too.
    if (largest := buffer.ids.view(np.uint32).max(initial=0)) >= vocab:
        files = sorted({str(shard.path) for shard in tokens.shards})
        raise DataError(
            f"{files[0]}{' or another shard' * (len(files) > 1)}: holds the id {largest} and the tokenizer "
            f"only {vocab}; delete a cache and it is built again, or check a corpus with gpt-jax prepare "
            "--verify"
        )
