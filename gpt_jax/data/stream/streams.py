"""Streams of batches, which Grain reads ahead off the main thread.

A batch is a pure function of its number. The only state is therefore the number of the next batch,
and the share of a process is a slice of the rows. Nothing here knows how many processes there are.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from gpt_jax import config
from gpt_jax.data.stream.rows import Columns
from gpt_jax.data.tokens.guard import Guard, share_files
from gpt_jax.data.tokens.shards import Tokens

# The rows of this process in a global batch of so many rows.
RowsOf = Callable[[int], slice]

# (numbers of rows, pieces of an example) -> columns. Row n is piece n % pieces of example
# n // pieces.
MakeRows = Callable[[np.ndarray, int], Columns]


class Batches:
    """Random access to batches.

    `self[n]` is this process's rows of batch n as columns [rows, T]. `sizes` says with which
    example the batch begins, how many it has, and into how many rows each is cut. Batches before
    `start` may have a size that is not for this mesh, so they cannot be asked for.
    """

    def __init__(
        self,
        make: MakeRows,
        sizes: config.BatchSizes,
        rows_of: RowsOf,
        count: int,
        start: int = 0,
    ):
        self._make = make
        self._sizes = sizes
        self._count = count
        self._rows = {
            (size, pieces): np.arange(size * pieces, dtype=np.int64)[rows_of(size * pieces)]
            for size, pieces in sizes.shapes_from(start)
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Columns:
        _, _, size, pieces = self._sizes.level(index)
        first = self._sizes.examples(index) * pieces
        return self._make(first + self._rows[size, pieces], pieces)

    def __repr__(self) -> str:
        rows = {shape: len(rows) for shape, rows in self._rows.items()}
        return f"Batches(rows of each batch size and cut: {rows})"


class Stream:
    """An iterator of batches from number `start` on.

    `threads` threads make `prefetch` batches ahead. `guard` looks at the shards meanwhile. Close
    the stream when done.
    """

    def __init__(
        self,
        batches: Batches,
        prefetch: int,
        threads: int,
        start: int = 0,
        summary: Sequence[str] = (),
        shares: Callable[[int], dict[str, float]] = lambda step: {},
        guard: Guard | None = None,
    ):
        self.summary = tuple(summary)  # lines about the rows, for people
        self.shares = shares  # the shares at a step, see Examples.shares
        self._guard = guard
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._iterator.set_state({"next_index": start})

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Columns:
        """The next batch as numpy columns [rows of this process, T], see `rows.make_columns`.

        Raises DataError if the data has become damaged.
        """
        if self._guard is not None:
            self._guard.check()
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        """`{"next": n}`, where n is the number of the next batch.

        A stream with `start=n` continues there in O(1).
        """
        return {"next": int(self._iterator.get_state()["next_index"])}

    def close(self) -> None:
        """Stops the threads that read ahead, and the guard."""
        self._iterator.close()
        if self._guard is not None:
            self._guard.close()


def open_guard(sides: Sequence[Tokens], knobs: config.Data, batch_size: int, rows: slice) -> Guard:
    """The guard of the files that this process looks at, by its rows of a batch.

    Raises DataError as `Guard` does.
    """
    start, stop, _ = rows.indices(batch_size)
    parts = max(1, batch_size // max(1, stop - start))
    part = min(start * parts // batch_size, parts - 1)
    return Guard(share_files(sides, part, parts), Path(knobs.cache).expanduser())


class EvalBatches:
    """Held-out batches, the same every time they are iterated.

    The last batch is padded with rows of weight 0.
    """

    def __init__(self, batches: Batches, data: config.Data, open_guard: Callable[[], Guard]):
        self._batches = batches
        self._data = data
        self._open_guard = open_guard

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Columns]:
        stream = Stream(
            self._batches, self._data.prefetch, self._data.threads, guard=self._open_guard()
        )
        try:
            yield from stream
        finally:
            stream.close()
