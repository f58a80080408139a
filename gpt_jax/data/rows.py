"""Tokens to rows: numpy columns of B rows by T tokens (called by pipeline).

A row of ROWS makes training rows; `InOrder` reads held-out text once from front to back. The shift by one between
`tokens` and `targets` happens here and nowhere else.
"""

from typing import Callable

import numpy as np

from gpt_jax.data.order import permute, random_below
from gpt_jax.data.store import Tokens
from gpt_jax.errors import DataError, UsageError

Columns = dict[str, np.ndarray]


def _take(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [N, length] from `starts` on, 0 beyond the last token; bool [N, length], whether there is a token)."""
    tokens.check()
    ids = np.zeros((len(starts), length), np.int32)
    there = np.clip(len(tokens.tokens) - starts, 0, length)
    # Slices give a third more tokens a second than one array of indices.
    for row, start, count in zip(ids, starts.tolist(), there.tolist()):
        row[:count] = tokens.tokens[start: start + count]
    return ids, np.arange(length) < there[:, None]


def _document_starts(tokens: Tokens, starts: np.ndarray, length: int) -> np.ndarray:
    """bool [N, length]: where a document begins inside a row, its first place left out."""
    first = np.searchsorted(tokens.offsets, starts, "right")
    counts = np.searchsorted(tokens.offsets, starts + length - 1, "right") - first
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), bool)
    begins[row, tokens.offsets[first[row] + nth] - starts[row]] = True
    return begins


def columns(tokens: Tokens, token_bytes: np.ndarray, starts: np.ndarray, seq_len: int, apart: bool) -> Columns:
    """The rows that begin at `starts` (int64 [N]), each of T = seq_len tokens; beyond the last token is padding.

    tokens, targets  int32 [N, T]    targets[i] follows tokens[i]; padding is 0
    weight           float32 [N, T]  1 where the target is to be predicted; 0 in padding, and if `apart` where the
                                     target begins another document
    bytes            int32 [N, T]    UTF-8 bytes of each predicted target, 0 elsewhere
    segment          int32 [N, T]    only if `apart`: 1, 2, … by document within the row; 0 in padding
    position         int32 [N, T]    only if `apart`: place in the document, from 0 where the document or the row begins

    DataError if the token file has shrunk or holds ids beyond the vocabulary.
    """
    ids, inside = _take(tokens, starts, seq_len + 1)
    if ids.max(initial=0) >= len(token_bytes):
        raise DataError(f"{tokens.label}: holds the id {ids.max()} and the tokenizer only {len(token_bytes)}; delete "
                        "it, and it is built again")
    predicted, kept = inside[:, 1:], {}
    if apart:
        begins = _document_starts(tokens, starts, seq_len + 1)
        predicted = predicted & ~begins[:, 1:]
        begins, inside, place = begins[:, :-1], inside[:, :-1], np.arange(seq_len, dtype=np.int32)
        segment = np.cumsum(begins, axis=1, dtype=np.int32) + 1
        position = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        kept = {"segment": segment * inside, "position": position * inside}
    targets = ids[:, 1:].copy()  # contiguous here, off the main thread, so that the transfer need not copy
    return {"tokens": ids[:, :-1].copy(), "targets": targets, "weight": predicted.astype(np.float32),
            "bytes": token_bytes[targets] * predicted, **kept}


def _need(tokens: Tokens, seq_len: int) -> None:
    if len(tokens.tokens) <= seq_len:
        raise UsageError(f"config.train.seq_len = {seq_len}: the training text has {len(tokens.tokens)} tokens and a "
                         f"row needs {seq_len + 1}; give more text or a shorter row")


class Window:
    """Rows at random places, with replacement, every place where T + 1 tokens exist as likely (nanoGPT's get_batch).

    `rows(indices)`: int64 [N] -> columns; a pure function of (seed, index). `count`: rows that hold as many tokens
    as the text. `left_out`: tokens that no row of an epoch has.
    """

    apart = False

    def __init__(self, tokens: Tokens, token_bytes: np.ndarray, seq_len: int, seed: int):
        _need(tokens, seq_len)
        self.tokens, self.token_bytes, self.seq_len, self.seed = tokens, token_bytes, seq_len, seed
        self.count = (len(tokens.tokens) - 1) // seq_len
        self.left_out = 0

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return random_below(len(self.tokens.tokens) - self.seq_len, self.seed, indices)

    def rows(self, indices: np.ndarray) -> Columns:
        return columns(self.tokens, self.token_bytes, self.starts(indices), self.seq_len, self.apart)


class Chunk(Window):
    """Every token once an epoch: row r is tokens[r*T : r*T + T + 1], in another random order each epoch. The tail that
    fills no row is left out, `left_out` says how long it is."""

    def __init__(self, tokens: Tokens, token_bytes: np.ndarray, seq_len: int, seed: int):
        super().__init__(tokens, token_bytes, seq_len, seed)
        self.left_out = len(tokens.tokens) - 1 - self.count * seq_len

    def starts(self, indices: np.ndarray) -> np.ndarray:
        return self.seq_len * permute(indices % self.count, self.count, self.seed, indices // self.count)


class Packed(Chunk):
    """The same rows with documents kept apart by `segment` and `position`; no document predicts the next."""

    apart = True


ROWS: dict[str, Callable] = {"window": Window, "chunk": Chunk, "packed": Packed}


class InOrder:
    """Held-out rows, sequential, the last one padded, so that every token is a target exactly once. The first token of
    the text has nothing before it and is no target (nor, if `apart`, the first of each document)."""

    def __init__(self, tokens: Tokens, token_bytes: np.ndarray, seq_len: int, apart: bool):
        if len(tokens.tokens) < 2:
            raise UsageError(f"the {tokens.name} text has {len(tokens.tokens)} token and there is nothing to predict; "
                             "hold out more by config.data.eval_fraction or give config.data.eval_path")
        self.tokens, self.token_bytes, self.seq_len, self.apart = tokens, token_bytes, seq_len, apart
        self.count = -(-(len(tokens.tokens) - 1) // seq_len)

    def rows(self, indices: np.ndarray) -> Columns:
        """Columns of rows `indices`; those from `count` on are padding."""
        return columns(self.tokens, self.token_bytes, indices * self.seq_len, self.seq_len, self.apart)
