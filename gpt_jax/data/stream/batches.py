"""Rows to streams: batches as a Grain data set, read ahead off the main thread (called by loop and
commands).

A batch is a pure function of its number, so the only state is the number of the next one, and the
share of a process is a slice of the rows: nothing here knows how many processes there are.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from gpt_jax import config
from gpt_jax.data.stream import mixture, transforms
from gpt_jax.data.stream.dataset import Dataset, Part, check_fim
from gpt_jax.data.stream.order import random_bits
from gpt_jax.data.stream.rows import (
    PACKINGS,
    Buffer,
    Columns,
    InOrder,
    Span,
    Window,
    check_ids,
    make_columns,
)
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import UsageError

FIM_ORDER = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # in which transforms takes them
ENDLESS = 2**62  # batches in a stream that has no end; Grain wants a length


@dataclass(frozen=True, eq=False)
class Examples:
    """Training rows by number, mixed from sources: `columns(indices)`, int64 [N] -> Columns [N,
    T]."""

    names: tuple[str, ...]
    rows: tuple[Window, ...]  # of each source
    mix: mixture.Mixture | None  # None: one source
    tokenizer: Tokenizer
    knobs: config.Data
    seed: int

    def assign(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [N], row within the source [N])."""
        return self.mix.assign(indices) if self.mix else (np.zeros(len(indices), np.int64), indices)

    def drawn(self, examples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `examples` come from each."""
        return self.mix.drawn(examples) if self.mix else np.array([examples])

    def shares(self, examples: int) -> dict[str, float]:
        """{source: its part of the rows} in the phase of the mixture that the last of the first
        `examples` is in: the weights of the sources in the mean of their held-out metrics, here
        and in `gpt-jax evaluate`."""
        shares = self.mix.shares(max(0, examples - 1)).tolist() if self.mix else [1.0]
        return dict(zip(self.names, shares))

    def fill(self, indices: np.ndarray) -> Buffer:
        """Rows before the shift, transforms applied."""
        source, nth = self.assign(indices)
        buffer = None
        for i in np.unique(source):
            mine = source == i
            part = self.rows[i].fill(nth[mine])
            check_ids(part, self.rows[i].tokens, self.tokenizer.vocab)
            if buffer is None:
                buffer = Buffer(
                    *(np.zeros((len(indices), column.shape[1]), column.dtype) for column in part)
                )
            for whole, column in zip(buffer, part):
                whole[mine] = column
        if self.knobs.shuffle_documents:
            buffer = transforms.shuffle_documents(buffer, self.seed + 1, indices)
        if self.knobs.fim:
            buffer = transforms.fill_in_the_middle(
                buffer,
                self.seed + 2,
                indices,
                self.knobs.fim,
                self.knobs.fim_spm,
                [self.tokenizer.specials[name] for name in FIM_ORDER],
                self.tokenizer.eot,
            )
        return buffer

    def columns(self, indices: np.ndarray) -> Columns:
        return make_columns(
            self.fill(indices), self.tokenizer.token_bytes, self.knobs.document_mask
        )

    def spans(self, index: int) -> tuple[int, list[Span]]:
        """(source, the documents that example `index` is made of, in the order before
        `shuffle_documents`)."""
        source, nth = self.assign(np.array([index]))
        return int(source[0]), self.rows[source[0]].spans(int(nth[0]))


class Batches:
    """Random access to batches: `self[n]` is rows `n * batch_size + rows`, as columns
    [len(rows), T]."""

    def __init__(self, make, batch_size: int, rows: slice, count: int):
        self._make, self._batch_size, self._count = make, batch_size, count
        self._rows = np.arange(batch_size, dtype=np.int64)[rows]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Columns:
        return self._make(number * self._batch_size + self._rows)

    def __repr__(self) -> str:
        return f"Batches(batch_size={self._batch_size}, rows={len(self._rows)})"


class Stream:
    """An iterator of batches from number `start` on, `prefetch` of them made ahead by `threads`.
    Close it when done."""

    def __init__(
        self,
        batches: Batches,
        prefetch: int,
        threads: int,
        start: int = 0,
        summary: Sequence[str] = (),
        shares: Callable[[int], dict[str, float]] = lambda step: {},
    ):
        self.summary = tuple(summary)  # lines about the rows, for people
        self.shares = shares  # at a step, see Examples.shares
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._iterator.set_state({"next_index": start})

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Columns:
        """The next batch: numpy columns [rows of this process, T], see rows.columns. DataError
        for data turned bad."""
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        """`{"next": n}`: the number of the batch that `next` gives; `start=n` goes on there in
        O(1)."""
        return {"next": int(self._iterator.get_state()["next_index"])}

    def close(self) -> None:
        self._iterator.close()


class EvalBatches:
    """Held-out batches, the same every time they are iterated, the last padded with rows of
    weight 0."""

    def __init__(self, batches: Batches, data: config.Data):
        self._batches, self._data = batches, data

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Columns]:
        stream = Stream(self._batches, self._data.prefetch, self._data.threads)
        try:
            yield from stream
        finally:
            stream.close()


def _row_shares(
    weights, parts: Sequence[Part], rows: Sequence[Window], knobs: config.Data
) -> np.ndarray:
    """float [sources]: the part of the rows for each source, from `weights` in tokens or
    documents."""
    size = {
        "tokens": [part.train.size for part in parts],
        "documents": [part.train.documents for part in parts],
    }
    amount = np.array(size[knobs.weights], float)  # in the unit of the weights
    wanted = np.array(weights, float)
    if knobs.temperature:
        wanted = wanted * (amount / amount.max()) ** (1 / knobs.temperature)
    # Tokens in a row are as many as its places are filled; a source whose rows hold less needs more
    # of them.
    a_row = {
        "tokens": [source.filled for source in rows],
        "documents": [n / source.count for n, source in zip(amount, rows)],
    }[knobs.weights]
    return wanted / np.array(a_row)


def make_mixture(
    parts: Sequence[Part], rows: Sequence[Window], knobs: config.Data, seq_len: int, seed: int
) -> mixture.Mixture:
    """The phases of config.data as counts. UsageError for weights that cannot be."""
    names = tuple(part.name for part in parts)
    phases = ((0, tuple(part.weight for part in parts)), *knobs.phases)
    mixture.check(phases, names)
    counts, begins = [], []
    for i, (token, weights) in enumerate(phases):
        counts.append(
            mixture.apportion(_row_shares(weights, parts, rows, knobs), knobs.block, names)
        )
        begins.append(-(-token // seq_len))  # the first row that begins there
        if i and begins[i] <= begins[i - 1]:
            raise UsageError(
                f"config.data.phases[{i - 1}] begins at token {token:,}, within the first row "
                f"({seq_len:,} tokens) of the phase before; let phases be further apart"
            )
    return mixture.make(np.array(counts), begins, seed)


def _source_seed(seed: int, name: str, only: bool) -> int:
    """Sources have orders of their own: two that hold the same text do not repeat each other."""
    return seed if only else int(random_bits(seed, *name.encode())[0] >> np.uint64(1))


@functools.lru_cache(
    1
)  # a job compares it between its processes first; packing a large corpus takes a while
def make_examples(data: Dataset, knobs: config.Data, seq_len: int, seed: int) -> Examples:
    """Rows of all sources and their mixture. UsageError for too little text, or settings that do
    not fit."""
    parts = data.parts
    check_fim(knobs, data.tokenizer.name, data.tokenizer.specials)

    def label(part):
        return "the training text" if len(parts) == 1 else f"source {part.name}"

    rows = tuple(
        PACKINGS[knobs.packing](
            part.train, seq_len, _source_seed(seed, part.name, len(parts) == 1), label(part)
        )
        for part in parts
    )
    mix = make_mixture(parts, rows, knobs, seq_len, seed)  # of one source too, for what it refuses
    mix = mix if len(parts) > 1 else None
    return Examples(tuple(part.name for part in parts), rows, mix, data.tokenizer, knobs, seed)


def check_sizes(examples: Examples, batch_size: int) -> None:
    """UsageError for text that makes less than a batch."""
    most = examples.mix.weights.max(axis=0) if examples.mix else np.ones(1)
    for name, rows, share in zip(examples.names, examples.rows, most):
        needed = max(1, int(batch_size * share))
        if rows.count < needed:
            what = (
                f"{needed} of them from source {name}, which"
                if examples.mix
                else "the training text"
            )
            raise UsageError(
                f"config.train.batch_size = {batch_size}: {what} of {rows.tokens.size} tokens has "
                f"{rows.count} rows of config.train.seq_len = {rows.length - 1}, less than a batch; give "
                "more text, shorter rows or a smaller batch"
            )


def describe(examples: Examples, batch_size: int, steps: int) -> list[str]:
    """A line a source: rows, how full they are, what is lost, how many epochs `steps` batches
    make; and a line for each phase that so few steps never reach."""
    lines, tokens = [], batch_size * steps * (examples.rows[0].length - 1)
    for name, rows, drawn in zip(examples.names, examples.rows, examples.drawn(batch_size * steps)):
        line = (
            f"{examples.knobs.packing} rows: {rows.count:,} of {rows.length - 1:,} tokens an epoch"
        )
        if rows.filled < 1:
            line += f", {rows.filled:.1%} filled"
        if rows.lost:
            line += f"; {rows.lost:,} tokens fill no row and are left out"
        if examples.mix:
            part = drawn / max(1, batch_size * steps)
            epochs = drawn / rows.count
            line = f"source {name}: {epochs:{'.2f' if epochs >= 0.1 else '.2g'}} epochs, {part:.2%} of the rows; {line}"
        lines.append(line)
    return lines + [
        f"config.data.phases[{i}] begins at token {token:,}, and the run ends before it, at token "
        f"{tokens:,}: it is never reached"
        for i, (token, _) in enumerate(examples.knobs.phases)
        if steps and token > tokens - examples.rows[0].length + 1
    ]


def make_stream(
    data: Dataset,
    knobs: config.Data,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: slice,
    start: int = 0,
    steps: int = 0,
) -> Stream:
    """Training batches without end. `batch_size` rows make a global batch, of which this process
    gets `rows`; row i of batch n is example n * batch_size + i whatever the slices. `steps` is
    for the summary only. UsageError for a text shorter than a row or a batch."""
    examples = make_examples(data, knobs, seq_len, seed)
    check_sizes(examples, batch_size)
    batches = Batches(examples.columns, batch_size, rows, ENDLESS)
    return Stream(
        batches,
        knobs.prefetch,
        knobs.threads,
        start,
        describe(examples, batch_size, steps),
        lambda step: examples.shares(step * batch_size),
    )


def make_eval_batches(
    tokens: Tokens,
    tokenizer: Tokenizer,
    knobs: config.Data,
    seq_len: int,
    batch_size: int,
    rows: slice,
    limit: int = 0,
    name: str = "the held-out text",
) -> EvalBatches:
    """All held-out text in order, or its first `limit` batches (0: all); as many batches on
    every process, with the columns of training. UsageError, by `name`, for text of one token."""
    source = InOrder(tokens, seq_len, name)

    def make(indices: np.ndarray) -> Columns:
        buffer = source.fill(indices)
        check_ids(buffer, tokens, tokenizer.vocab)
        return make_columns(buffer, tokenizer.token_bytes, knobs.document_mask)

    count = -(-source.count // batch_size)
    return EvalBatches(
        Batches(make, batch_size, rows, min(limit, count) if limit else count), knobs
    )
