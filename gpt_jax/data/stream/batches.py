"""Training rows and held-out rows by number, mixed from sources, and the streams of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt_jax import config
from gpt_jax.data.stream import mixture, transforms
from gpt_jax.data.stream.dataset import Dataset, Part
from gpt_jax.data.stream.fitting import check_fim
from gpt_jax.data.stream.order import random_bits
from gpt_jax.data.stream.rows import (
    PACKINGS,
    Buffer,
    Columns,
    InOrder,
    Span,
    Window,
    check_ids,
    check_targets,
    cut,
    cut_spans,
    make_columns,
)
from gpt_jax.data.stream.streams import Batches, EvalBatches, RowsOf, Stream, open_guard
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import UsageError

# `transforms.fill_in_the_middle` takes the sentinels in this order.
FIM_ORDER = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

# The length of an endless stream, because Grain wants one.
ENDLESS = 2**62


@dataclass(frozen=True, eq=False)
class Examples:
    """Training rows by number, mixed from sources."""

    names: tuple[str, ...]
    rows: tuple[Window, ...]  # the rows of each source
    mix: mixture.Mixture | None  # None if the only source is one text
    tokenizer: Tokenizer
    knobs: config.Data
    seed: int

    def assign(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [N], row within the source [N])."""
        if self.mix:
            return self.mix.assign(indices)
        return np.zeros(len(indices), np.int64), indices

    def drawn(self, examples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `examples` come from each."""
        return self.mix.drawn(examples) if self.mix else np.array([examples])

    def shares(self, examples: int) -> dict[str, float]:
        """{source: its part of the rows} in the phase that the last of the first `examples` is in.

        Training and `gpt-jax evaluate` weight the held-out metrics of the sources by these shares.
        """
        shares = self.mix.shares(max(0, examples - 1)).tolist() if self.mix else [1.0]
        return dict(zip(self.names, shares, strict=True))

    def _read(self, indices: np.ndarray) -> Buffer:
        """Whole examples before the shift, as they are in the text.

        Raises DataError if a row holds an id that the tokenizer does not have.
        """
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
            for whole, column in zip(buffer, part, strict=True):
                whole[mine] = column

        assert buffer is not None  # a batch has at least one row
        return buffer

    def fill(self, indices: np.ndarray, pieces: int = 1) -> Buffer:
        """Rows before the shift, with the transforms applied.

        Each example is cut into `pieces` rows of equal length, and row n is piece n % pieces of
        example n // pieces. A transform works on the row that is left.

        Raises DataError if a row holds an id that the tokenizer does not have.
        """
        if pieces == 1:
            buffer = self._read(indices)
        else:
            numbers, place = np.divmod(indices, pieces)
            examples, which = np.unique(numbers, return_inverse=True)
            rows = cut(self._read(examples), pieces)
            buffer = Buffer(*(column[which * pieces + place] for column in rows))

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
                self.tokenizer.begin if self.knobs.begin else None,
            )
        return buffer

    def columns(self, indices: np.ndarray, pieces: int = 1) -> Columns:
        """Rows `indices`, int64 [N], of examples cut into `pieces`, as Columns [N, T / pieces]."""
        return make_columns(
            self.fill(indices, pieces), self.tokenizer.token_bytes, self.knobs.document_mask
        )

    def spans(self, index: int, pieces: int = 1) -> tuple[int, list[Span]]:
        """(source, documents that row `index` of examples cut into `pieces` is made of).

        The documents are in the order before `shuffle_documents`.
        """
        example, place = divmod(index, pieces)
        source, nth = self.assign(np.array([example]))
        rows = self.rows[source[0]]
        length = (rows.length - 1) // pieces
        spans = cut_spans(rows.spans(int(nth[0])), place * length, length + 1)
        return int(source[0]), list(spans)


def _row_shares(
    weights, parts: Sequence[Part], rows: Sequence[Window], knobs: config.Data
) -> np.ndarray:
    """float [sources]: the part of the rows for each source.

    `weights` are parts of the tokens or of the documents, as `knobs.weights` says.
    """
    size = {
        "tokens": [part.train.size for part in parts],
        "documents": [part.train.documents for part in parts],
    }
    amount = np.array(size[knobs.weights], float)
    wanted = np.array(weights, float)
    if knobs.temperature:
        wanted = wanted * (amount / amount.max()) ** (1 / knobs.temperature)

    # A source whose rows hold less of the weights' unit needs more rows. The unit is tokens, of
    # which a row holds as many as it has filled places, or documents.
    per_row = {
        "tokens": [source.filled for source in rows],
        "documents": [n / source.count for n, source in zip(amount, rows, strict=True)],
    }
    return wanted / np.array(per_row[knobs.weights])


def make_mixture(
    parts: Sequence[Part], rows: Sequence[Window], knobs: config.Data, seq_len: int, seed: int
) -> mixture.Mixture:
    """The mixture of the phases of config.data.

    Raises UsageError for weights or phases that make no mixture.
    """
    names = tuple(part.name for part in parts)
    phases = ((0, tuple(part.weight for part in parts)), *knobs.phases)
    mixture.check(phases, names)

    counts = []
    begins = []
    for i, (token, weights) in enumerate(phases):
        shares = _row_shares(weights, parts, rows, knobs)
        counts.append(mixture.apportion(shares, knobs.block, names))
        # A phase begins with the first row that begins at its token or after it.
        begins.append(-(-token // seq_len))
        if i and begins[i] <= begins[i - 1]:
            raise UsageError(
                f"config.data.phases[{i - 1}] begins at token {token:,}, within the first row "
                f"({seq_len:,} tokens) of the phase before; start this phase at least one row later"
            )
    return mixture.make(np.array(counts), begins, seed)


def _source_seed(seed: int, name: str, only: bool) -> int:
    """The seed of a source's order.

    Each of several sources has its own, so that two with the same text do not repeat each other.
    """
    if only:
        return seed
    return int(random_bits(seed, *name.encode("utf-8", "surrogateescape"))[0] >> np.uint64(1))


def make_examples(data: Dataset, knobs: config.Data, seq_len: int, seed: int) -> Examples:
    """Rows of all sources and their mixture.

    Raises UsageError if a text is too short or settings do not fit it.
    """
    parts = data.parts
    is_alone = len(parts) == 1
    check_fim(knobs, data.tokenizer.name, data.tokenizer.specials)
    if knobs.fim and (masked := [part.name for part in parts if part.train.learn]):
        raise UsageError(
            f"config.data.fim = {knobs.fim}: source {masked[0]} was prepared with --task, and "
            "rearranging a document would mix what is learned with what is not; set it to 0"
        )

    def make_rows(part):
        label = "the training text" if is_alone else f"source {part.name}"
        check_targets(part.train, knobs.document_mask, label)
        source_seed = _source_seed(seed, part.name, is_alone)
        return PACKINGS[knobs.packing](part.train, seq_len, source_seed, label)

    rows = tuple(make_rows(part) for part in parts)
    # The mixture of one source is made only because that refuses wrong phases.
    mix = make_mixture(parts, rows, knobs, seq_len, seed)
    names = tuple(part.name for part in parts)
    return Examples(names, rows, None if is_alone else mix, data.tokenizer, knobs, seed)


def check_sizes(
    examples: Examples, batch_size: int, field: str = "config.train.batch_size"
) -> None:
    """Raises UsageError, which names the field, if the text makes less than a batch."""
    most = examples.mix.weights.max(axis=0) if examples.mix else np.ones(1)
    for name, rows, share in zip(examples.names, examples.rows, most, strict=True):
        needed = max(1, int(batch_size * share))
        if rows.count >= needed:
            continue

        what = "the training text"
        if examples.mix:
            what = f"{needed} of them from source {name}, which"
        raise UsageError(
            f"{field} = {batch_size}: {what} of {rows.tokens.size} tokens has "
            f"{rows.count} rows of config.train.seq_len = {rows.length - 1}, less than a batch; "
            "give more text, shorter rows or a smaller batch"
        )


def _describe_rows(rows: Window, packing: str) -> str:
    """One source's rows in an epoch, how full they are and what is lost."""
    line = f"{packing} rows: {rows.count:,} of {rows.length - 1:,} tokens an epoch"
    if rows.filled < 1:
        line += f", {rows.filled:.1%} filled"
    if rows.lost:
        line += f"; {rows.lost:,} tokens fill no row and are left out"
    return line


def describe(examples: Examples, count: int) -> list[str]:
    """A line for each source, and one for each phase that the first `count` examples never reach.

    The line of a source tells its rows. With several sources it also tells how many epochs of the
    source so many examples make.
    """
    lines = []
    drawn_rows = examples.drawn(count)
    for name, rows, drawn in zip(examples.names, examples.rows, drawn_rows, strict=True):
        line = _describe_rows(rows, examples.knobs.packing)
        if examples.mix:
            part = drawn / max(1, count)
            epochs = drawn / rows.count
            digits = ".2f" if epochs >= 0.1 else ".2g"
            line = f"source {name}: {epochs:{digits}} epochs, {part:.2%} of the rows; {line}"
        lines.append(line)

    tokens = count * (examples.rows[0].length - 1)
    for i, (token, _) in enumerate(examples.knobs.phases):
        if count and token > tokens - examples.rows[0].length + 1:
            lines.append(
                f"config.data.phases[{i}] begins at token {token:,}, and the run ends before it, "
                f"at token {tokens:,}: it is never reached"
            )
    return lines


def make_stream(
    examples: Examples, batch_size: int, rows: slice, start: int = 0, steps: int = 0
) -> Stream:
    """Training batches without end.

    `batch_size` rows make a global batch, of which this process gets `rows`. Row i of batch n is
    example `n * batch_size + i`, whatever the slices are. `steps` is for the summary only. Raises
    UsageError if the text is shorter than a batch, and DataError for a shard with a wrong checksum.
    """
    check_sizes(examples, batch_size)
    sizes = config.read_batch_sizes([(0, batch_size)])
    return make_ramp_stream(examples, sizes, lambda size: rows, start, steps)


def make_ramp_stream(
    examples: Examples,
    sizes: config.BatchSizes,
    rows_of: RowsOf,
    start: int = 0,
    steps: int = 0,
) -> Stream:
    """Training batches without end, whose size and row length change on the way.

    This process gets the rows `rows_of(count)` of a global batch of `count` rows. Batch n has the
    examples from `sizes.examples(n)` on, whatever the slices are, each cut into rows as `sizes`
    says. `steps` is for the summary only. Raises DataError for a shard with a wrong checksum. The
    caller checks the sizes, see `check_sizes`.
    """
    knobs = examples.knobs
    sides = [source.tokens for source in examples.rows]
    first = sizes.level(start)
    first_rows = first.size * first.pieces
    return Stream(
        Batches(examples.columns, sizes, rows_of, ENDLESS, start),
        knobs.prefetch,
        knobs.threads,
        start,
        describe(examples, sizes.examples(steps)),
        lambda step: examples.shares(sizes.examples(step)),
        open_guard(sides, knobs, first_rows, rows_of(first_rows)),
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
    stride: int = 0,
) -> EvalBatches:
    """All held-out text in order, or its first `limit` batches if `limit` is not 0.

    A row begins `stride` tokens after the one before, see `InOrder`. Every process gets as many
    batches, with the columns of training. Raises UsageError, which calls the text `name`, if the
    text has fewer than two tokens, or no target.
    """
    check_targets(tokens, knobs.document_mask, name)
    source = InOrder(tokens, seq_len, name, stride)

    def make(indices: np.ndarray, pieces: int) -> Columns:
        assert pieces == 1, "held-out rows are never cut"
        buffer = source.fill(indices)
        check_ids(buffer, tokens, tokenizer.vocab)
        return make_columns(buffer, tokenizer.token_bytes, knobs.document_mask)

    count = -(-source.count // batch_size)
    if limit:
        count = min(limit, count)
    guard = functools.partial(open_guard, [tokens], knobs, batch_size, rows)
    sizes = config.read_batch_sizes([(0, batch_size)])
    batches = Batches(make, sizes, lambda size: rows, count)
    return EvalBatches(batches, knobs, guard)
