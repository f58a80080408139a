"""Turns tokens into rows, and rows into numpy columns of B rows by T tokens.

The classes in PACKINGS make training rows. `InOrder` reads held-out text once from front to back.
Both return a Buffer of T + 1 ids. Only `make_columns` shifts `targets` by one against `tokens`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.data.stream import packing
from gpt_jax.data.stream.order import permute, random_below
from gpt_jax.data.tokens.shards import LEARN, Tokens
from gpt_jax.errors import DataError, UsageError

Columns = dict[str, np.ndarray]


class Buffer(NamedTuple):
    """Rows before the shift, all [N, T + 1]."""

    ids: np.ndarray  # int32, 0 in padding
    begins: np.ndarray  # bool: a document, or a piece of one, begins here
    inside: np.ndarray  # bool: not padding
    learn: np.ndarray  # bool: to be learned; no matter in padding


def cut(buffer: Buffer, pieces: int) -> Buffer:
    """Rows [N, T + 1] -> [N * pieces, T / pieces + 1], the pieces of a row one after the other.

    Neighbours share an id, which is a target in the first and a token in the second. So each target
    of a row stays one target.
    """
    length = (buffer.ids.shape[1] - 1) // pieces
    places = np.arange(pieces)[:, None] * length + np.arange(length + 1)
    return Buffer(*(column[:, places].reshape(-1, length + 1) for column in buffer))


class Span(NamedTuple):
    """Part of a row that comes from one document."""

    column: int  # where in the row it begins
    size: int  # tokens
    document: int
    offset: int  # place of its first token in the document


def _begins(tokens: Tokens, starts: np.ndarray, length: int) -> np.ndarray:
    """bool [N, length]: where a document begins in the tokens that follow `starts`."""
    first = np.searchsorted(tokens.offsets, starts, "left")
    counts = np.searchsorted(tokens.offsets, starts + length - 1, "right") - first
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), bool)
    begins[row, tokens.offsets[first[row] + nth] - starts[row]] = True
    return begins


def contiguous(tokens: Tokens, starts: np.ndarray, length: int) -> Buffer:
    """The `length` tokens that follow each of `starts`, int64 [N].

    Rows are padded beyond the last token. Raises DataError if a token file is damaged.
    """
    ids = np.zeros((len(starts), length), tokens.dtype)
    learn = np.zeros(ids.shape, LEARN)
    counts = np.clip(tokens.size - starts, 0, length)
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        tokens.read(start, ids[row, :count])
        tokens.read_learn(start, learn[row, :count])

    inside = np.arange(length) < counts[:, None]
    begins = _begins(tokens, starts, length)
    return Buffer(ids.astype(np.int32), begins, inside, learn.astype(bool))


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
            column += count
            start += count
            size -= count
            document += 1


def cut_spans(spans: Iterable[Span], start: int, size: int) -> Iterator[Span]:
    """The parts of documents that lie in the columns from `start` on, `size` of them."""
    for column, count, document, offset in spans:
        first = max(column, start)
        last = min(column + count, start + size)
        if first < last:
            yield Span(first - start, last - first, document, offset + first - column)


def make_columns(buffer: Buffer, token_bytes: np.ndarray, document_mask: bool) -> Columns:
    """A Buffer of T + 1 ids as columns [N, T].

    `tokens` and `targets` are int32: targets[i] follows tokens[i], and padding is 0.
    `weight` is float32: 1 where the target is to be predicted. It is 0 in padding, where the target
    is not to be learned and, with `document_mask`, where it begins another document.
    `bytes` is int32: the UTF-8 bytes of each predicted target, and 0 elsewhere.

    Two columns exist only with `document_mask`.
    `segment` is int32: 1, 2, … by document within the row, and 0 in padding.
    `position` is int32: the place in the document, from 0 where the document or the row begins.
    """
    ids, begins, inside, learn = buffer
    predicted = inside[:, 1:] & learn[:, 1:]
    document_columns = {}
    if document_mask:
        predicted = predicted & ~begins[:, 1:]
        here = inside[:, :-1]
        place = np.arange(ids.shape[1] - 1, dtype=np.int32)
        starts = begins[:, :-1].copy()
        starts[:, 0] = True
        segment = np.cumsum(starts, axis=1, dtype=np.int32)
        position = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
        document_columns = {"segment": segment * here, "position": position * here}

    # The copies make columns contiguous off the main thread, so that the transfer need not copy.
    targets = ids[:, 1:].copy()
    return {
        "tokens": ids[:, :-1].copy(),
        "targets": targets,
        "weight": predicted.astype(np.float32),
        "bytes": token_bytes[targets] * predicted,
        **document_columns,
    }


class Window:
    """Rows at random places, drawn with replacement (nanoGPT's get_batch).

    Every place that T + 1 tokens follow is equally likely. `count` is the number of rows that hold
    as many tokens as the text. `lost` is the number of tokens that no row of an epoch predicts.
    `filled` is the part of the rows' places that holds tokens. Raises UsageError if the text is
    too short.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, name: str = "the training text"):
        self.tokens = tokens
        self.length = seq_len + 1
        self.seed = seed
        self.name = name
        self.lost = 0
        self.filled = 1.0
        self._plan(seq_len)

    def _plan(self, seq_len: int) -> None:
        """Sets `count`, and `lost` and `filled` if they differ from 0 and 1."""
        if self.tokens.size <= seq_len:
            raise UsageError(
                f"config.train.seq_len = {seq_len}: {self.name} has {self.tokens.size} tokens and "
                f"a row needs {seq_len + 1}; give more text or a shorter row"
            )
        self.count = (self.tokens.size - 1) // seq_len

    def _need_pairs(self) -> None:
        """Raises UsageError if no document has two tokens."""
        if np.diff(self.tokens.offsets).max() < 2:
            raise UsageError(
                f"config.data.packing: {self.name} has no document of two tokens, so there is "
                "nothing to predict; give other text, or config.data.packing=chunk"
            )

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """Where rows begin, int64 [N]."""
        return random_below(self.tokens.size - self.length + 1, self.seed, indices)

    def fill(self, indices: np.ndarray) -> Buffer:
        """Rows `indices`, int64 [N]. They are a pure function of the seed and the indices."""
        return contiguous(self.tokens, self.starts(indices), self.length)

    def spans(self, index: int) -> list[Span]:
        """The documents that row `index` is made of."""
        start = int(self.starts(np.array([index]))[0])
        return list(spans(self.tokens, [(start, min(self.length, self.tokens.size - start))]))

    def _row(self, indices: np.ndarray) -> np.ndarray:
        """The row of the text for each index: each row once an epoch, in a new random order."""
        return permute(indices % self.count, self.count, self.seed, indices // self.count)


class Chunk(Window):
    """Every token once an epoch: row r is tokens[r*T : r*T + T + 1].

    A document is cut where a row ends. The tail that fills no row is lost.
    """

    def _plan(self, seq_len: int) -> None:
        super()._plan(seq_len)
        self.lost = self.tokens.size - 1 - self.count * seq_len

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return (self.length - 1) * self._row(indices)


class AtDocument(Window):
    """Every row begins with a document, and the documents after it follow.

    The tokens that the last document has beyond the row are lost.
    """

    def _plan(self, seq_len: int) -> None:
        self._need_pairs()
        self._starts = packing.at_documents(self.tokens.offsets, seq_len)
        self.count = len(self._starts)
        ends = np.minimum(self._starts + seq_len, self.tokens.size - 1)
        predicted = int((ends - self._starts).sum())
        self.lost = self.tokens.size - 1 - predicted
        self.filled = predicted / (self.count * seq_len)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return self._starts[self._row(indices)]


class FirstFit(Window):
    """Whole documents, as many as fit in a row, see `packing`. The rest of a row is padding."""

    how = "first_fit"

    def _plan(self, seq_len: int) -> None:
        self._need_pairs()
        self.plan = packing.plan(self.tokens.offsets, self.length, self.how, self.seed)
        self.count = self.plan.rows
        self.filled = int(self.plan.sizes.sum(dtype=np.int64)) / (self.count * self.length)

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(start, size) of the pieces of row `row` of the plan."""
        part = slice(self.plan.first[row], self.plan.first[row + 1])
        starts = self.plan.starts[part].tolist()
        sizes = self.plan.sizes[part].tolist()
        return list(zip(starts, sizes, strict=True))

    def fill(self, indices: np.ndarray) -> Buffer:
        ids = np.zeros((len(indices), self.length), self.tokens.dtype)
        begins = np.zeros(ids.shape, bool)
        learn = np.zeros(ids.shape, LEARN)
        sizes = np.zeros(len(indices), np.int64)

        for n, row in enumerate(self._row(indices).tolist()):
            at = 0
            for start, size in self.pieces(row):
                self.tokens.read(start, ids[n, at : at + size])
                self.tokens.read_learn(start, learn[n, at : at + size])
                begins[n, at] = True
                at += size
            sizes[n] = at

        inside = np.arange(self.length) < sizes[:, None]
        return Buffer(ids.astype(np.int32), begins, inside, learn.astype(bool))

    def spans(self, index: int) -> list[Span]:
        return list(spans(self.tokens, self.pieces(int(self._row(np.array([index]))[0]))))


class BestFit(FirstFit):
    """Whole documents as in FirstFit, the longest first, each where it leaves least room."""

    how = "best_fit"


PACKINGS: dict[str, Callable] = {
    "window": Window,
    "chunk": Chunk,
    "document": AtDocument,
    "first_fit": FirstFit,
    "best_fit": BestFit,
}


class InOrder:
    """Held-out rows in the order of the text, the last one padded.

    Every token is a target exactly once, except the first token of the text, because nothing
    comes before it. With `document_mask` the first token of each document is no target either.

    A row begins `stride` tokens after the one before; 0 means `seq_len`. Of rows after the first
    only the last `stride` tokens are targets, so each target sees at least `seq_len - stride`
    tokens of its text, or all before it. These are the strided windows of perplexity in Hugging
    Face's documentation.

    Raises UsageError if the text has fewer than two tokens.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, name: str = "the held-out text", stride: int = 0
    ):
        if tokens.size < 2:
            raise UsageError(
                f"{name} has {tokens.size} token and there is nothing to predict; hold out more "
                "(config.data.eval_fraction, --eval_fraction of prepare) or give "
                "config.data.eval_path"
            )
        self.tokens = tokens
        self.length = seq_len + 1
        self.stride = stride or seq_len
        self.count = 1 + max(0, -(-(tokens.size - 1 - seq_len) // self.stride))

    def fill(self, indices: np.ndarray) -> Buffer:
        """Rows `indices`. Rows from `count` on have no target."""
        buffer = contiguous(self.tokens, indices * self.stride, self.length)
        # These are targets of rows before.
        buffer.learn[indices > 0, 1 : self.length - self.stride] = False
        return buffer


def check_targets(tokens: Tokens, document_mask: bool, name: str) -> None:
    """Raises UsageError for a text, called `name`, that has no target in any row."""
    if document_mask and np.diff(tokens.offsets).max() < 2:
        raise UsageError(
            f"config.data.document_mask = True: {name} has no document of two tokens, so there is "
            "nothing to predict; give other text, or set it to false"
        )


def check_ids(buffer: Buffer, tokens: Tokens, vocab: int) -> None:
    """Raises DataError if the tokenizer lacks an id of `buffer`."""
    # A flipped bit can make an id negative. As uint32 a negative id is a large one.
    largest = buffer.ids.view(np.uint32).max(initial=0)
    if largest >= vocab:
        files = sorted({str(shard.path) for shard in tokens.shards})
        others = " or another shard" if len(files) > 1 else ""
        raise DataError(
            f"{files[0]}{others}: holds the id {largest} and the tokenizer only {vocab}; delete a "
            "cache and it is built again, or check a corpus with gpt-jax prepare --verify"
        )
