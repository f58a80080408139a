"""Rows to streams: batches as a Grain data set, read ahead off the main thread (called by loop and the evaluate command).

A batch is a pure function of its number, so the only state is the number of the next one, and the share of a process is
a slice of the rows: nothing here knows how many processes there are.
"""

from typing import Iterator

import grain
import numpy as np

from gpt_jax import config
from gpt_jax.data.rows import ROWS, Columns, InOrder
from gpt_jax.data.store import Tokens
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UsageError

# A batch is a few numpy calls that release the interpreter's lock only in part: one thread made as many tokens a second
# as two did, and leaves the other cores to the device.
READ_THREADS = 1
ENDLESS = 2**62  # batches in a stream that has no end; Grain wants a length


class Batches:
    """Random access to batches: `self[n]` is rows `n * batch_size + rows` of `source`, columns [len(rows), T]."""

    def __init__(self, source, batch_size: int, rows: slice, count: int):
        self._source, self._batch_size, self._count = source, batch_size, count
        self._rows = np.arange(batch_size, dtype=np.int64)[rows]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Columns:
        return self._source.rows(number * self._batch_size + self._rows)

    def __repr__(self) -> str:
        return f"Batches(batch_size={self._batch_size}, rows={len(self._rows)})"


class Stream:
    """An iterator of batches from number `start` on, `prefetch` of them made ahead. Close it when done."""

    def __init__(self, batches: Batches, prefetch: int, start: int = 0, summary: str = ""):
        self.summary = summary  # one line about the rows, for people
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._iterator.set_state({"next_index": start})

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Columns:
        """The next batch: numpy columns [rows of this process, T], see rows.columns. DataError for data turned bad."""
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        """`{"next": n}`: the number of the batch that `next` gives; `start=n` goes on there in O(1)."""
        return {"next": int(self._iterator.get_state()["next_index"])}

    def close(self) -> None:
        self._iterator.close()


class EvalBatches:
    """Held-out batches, the same every time they are iterated, the last padded with rows of weight 0."""

    def __init__(self, batches: Batches, prefetch: int):
        self._batches, self._prefetch = batches, prefetch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Columns]:
        stream = Stream(self._batches, self._prefetch)
        try:
            yield from stream
        finally:
            stream.close()


def make_stream(tokens: Tokens, tokenizer: Tokenizer, data: config.Data, seq_len: int, batch_size: int, seed: int,
                rows: slice, start: int = 0) -> Stream:
    """Training batches without end. `batch_size` rows make a global batch, of which this process gets `rows`; row i of
    batch n is example n * batch_size + i whatever the slices. UsageError for a text shorter than a row or a batch."""
    source = ROWS[data.rows](tokens, tokenizer.token_bytes, seq_len, seed)
    if source.count < batch_size:
        raise UsageError(f"config.train.batch_size = {batch_size}: the training text of {len(tokens.tokens)} tokens "
                         f"has {source.count} rows of config.train.seq_len = {seq_len}, less than a batch; give more "
                         "text, shorter rows or a smaller batch")
    summary = f"{data.rows} rows: {source.count:,} of {seq_len:,} tokens an epoch"
    if source.left_out:
        summary += f"; the last {source.left_out:,} tokens of the text fill no row and are left out"
    return Stream(Batches(source, batch_size, rows, ENDLESS), data.prefetch, start, summary)


def make_eval_batches(tokens: Tokens, tokenizer: Tokenizer, data: config.Data, seq_len: int, batch_size: int,
                      rows: slice, limit: int = 0) -> EvalBatches:
    """All held-out text in order, or its first `limit` batches (0: all); as many batches on every process. Documents
    are kept apart where `data.rows` is `packed`, and columns are those of training."""
    source = InOrder(tokens, tokenizer.token_bytes, seq_len, ROWS[data.rows].apart)
    count = -(-source.count // batch_size)
    return EvalBatches(Batches(source, batch_size, rows, min(limit, count) if limit else count), data.prefetch)
