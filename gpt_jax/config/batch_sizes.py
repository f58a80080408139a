"""The rows of each update, and so the examples that it reads.

A run begins with `train.batch_size`. Later sizes come from `train.batch_ramp`, or from a resume
with another batch size. `train.length_ramp` cuts the rows of an update into shorter ones, and
changes nothing else. Updates are counted from 0 here, so that update n is also batch n.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpt_jax.config.run_fields import Train

Pairs = Iterable[Sequence[int]]


class Level(NamedTuple):
    """Successive updates of one batch size and one row length."""

    step: int  # updates before it
    example: int  # its first example
    size: int  # examples of each of its updates
    pieces: int = 1  # rows that each example is cut into


@dataclass(frozen=True)
class BatchSizes:
    """A piecewise linear map from updates to examples. It depends on no mesh and no process.

    An example is a row of `train.seq_len` tokens, whatever rows it is cut into. The first level
    begins at 0, and the last one has no end.
    """

    levels: tuple[Level, ...]

    def level(self, step: int) -> Level:
        """The level of the update that comes after `step` updates."""
        return self.levels[bisect_right(self.levels, step, key=_step_of) - 1]

    def size(self, step: int) -> int:
        """The examples of the update that comes after `step` updates."""
        return self.level(step).size

    def examples(self, step: int) -> int:
        """How many examples the first `step` updates read. The next update begins with that one."""
        level = self.level(step)
        return level.example + (step - level.step) * level.size

    def find_step(self, example: int) -> int:
        """How many updates come before the first one that begins at or after `example`."""
        after = bisect_left(self.levels, example, lo=1, key=_example_of)
        level = self.levels[after - 1]
        return level.step + -(-(example - level.example) // level.size)

    def shapes_from(self, step: int) -> set[tuple[int, int]]:
        """(examples, pieces of each) of all updates that come after `step` updates."""
        first = self.levels.index(self.level(step))
        return {(level.size, level.pieces) for level in self.levels[first:]}

    def pairs(self, end: int) -> list[tuple[int, int]]:
        """(updates before it, examples) of each batch size that begins before `end`.

        A checkpoint has them.
        """
        return _drop_repeated((level.step, level.size) for level in self.levels if level.step < end)

    def cuts(self, end: int) -> list[tuple[int, int]]:
        """(updates before it, pieces) of each way to cut examples that begins before `end`."""
        return _drop_repeated(
            (level.step, level.pieces) for level in self.levels if level.step < end
        )


def _step_of(level: Level) -> int:
    return level.step


def _example_of(level: Level) -> int:
    return level.example


def _drop_repeated(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs (step, number) whose number differs from the one before."""
    kept: list[tuple[int, int]] = []
    for step, number in pairs:
        if not kept or kept[-1][1] != number:
            kept.append((step, number))
    return kept


def _read_pairs(pairs: Pairs, what: str) -> dict[int, int]:
    """{step: number}. Raises ValueError if the steps do not rise from 0, or a number is below 1."""
    numbers: dict[int, int] = {}
    last = -1
    for step, number in pairs:
        is_first_at_0 = bool(numbers) or step == 0
        if not is_first_at_0 or step <= last or number < 1:
            raise ValueError(f"no {what} that rise from step 0: ({step}, {number})")
        numbers[step] = number
        last = step

    if not numbers:
        raise ValueError(f"no {what}")
    return numbers


def read_batch_sizes(pairs: Pairs, cuts: Pairs = ((0, 1),)) -> BatchSizes:
    """The BatchSizes of (updates before it, examples) for each batch size.

    `cuts` are (updates before it, pieces of an example), and without them none is cut. Raises
    ValueError if either do not rise from 0, or if one has no rows.
    """
    sizes = _read_pairs(pairs, "batch sizes")
    pieces = _read_pairs(cuts, "row lengths")
    levels = [Level(0, 0, sizes[0], pieces[0])]
    for step in sorted({*sizes, *pieces} - {0}):
        last = levels[-1]
        size = sizes.get(step, last.size)
        parts = pieces.get(step, last.pieces)
        if (size, parts) != (last.size, last.pieces):
            example = last.example + (step - last.step) * last.size
            levels.append(Level(step, example, size, parts))
    return BatchSizes(tuple(levels))


def _find_entry(ramp: Sequence[Sequence[int]], tokens: int) -> int | None:
    """Which entry of a ramp has begun last, or None before the first one."""
    begun = [token for token, *_ in ramp if token <= tokens]
    return len(begun) - 1 if begun else None


def find_ramp_entry(train: Train, example: int) -> int | None:
    """Which entry of `train.batch_ramp` an update has that begins with `example`.

    It is None before the first entry, where `train.batch_size` counts.
    """
    return _find_entry(train.batch_ramp, example * train.seq_len)


def _find_shape(train: Train, tokens: int) -> tuple[int, int]:
    """(batch size, row length) of an update that begins at token `tokens`."""
    entry = _find_entry(train.batch_ramp, tokens)
    size = train.batch_size if entry is None else train.batch_ramp[entry][1]
    entry = _find_entry(train.length_ramp, tokens)
    length = train.seq_len if entry is None else train.length_ramp[entry][1]
    return size, length


def _list_tokens(train: Train) -> list[int]:
    """The tokens at which an entry of a ramp begins, in rising order."""
    return sorted({token for token, *_ in (*train.batch_ramp, *train.length_ramp)})


def make_batch_sizes(train: Train, past: BatchSizes | None = None, step: int = 0) -> BatchSizes:
    """The batch sizes of a run: those of its first `step` updates from `past`, then the config's.

    A size counts from the first update at or after its token, and so does a row length. The tokens
    of the past count as well, so a run that resumes with the same config has the sizes of one that
    was never stopped.
    """
    pairs = past.pairs(step) if past else []
    cuts = past.cuts(step) if past else []
    example = past.examples(step) if past else 0

    def add_level() -> None:
        size, length = _find_shape(train, example * train.seq_len)
        pairs.append((step, size))
        cuts.append((step, train.seq_len // length))

    add_level()
    for token in _list_tokens(train):
        missing = -(-token // train.seq_len) - example
        if missing > 0:
            updates = -(-missing // pairs[-1][1])
            step += updates
            example += updates * pairs[-1][1]
            add_level()
    return read_batch_sizes(pairs, cuts)


def list_levels(train: Train) -> list[Train]:
    """`train` at each of its batch shapes, in the order of the ramps' tokens.

    A row length that does not divide `train.seq_len` is left out, because the checks of the fields
    refuse it.
    """
    shapes = [_find_shape(train, token) for token in (0, *_list_tokens(train))]
    return [
        at_shape(train, size * (train.seq_len // length), length)
        for size, length in dict.fromkeys(shapes)
        if length > 0 and train.seq_len % length == 0
    ]


def at_shape(train: Train, rows: int, length: int) -> Train:
    """`train` without ramps, for batches of `rows` rows of `length` tokens.

    It has the microbatches that go with the batch size. Chunks of the loss are cut as rows are, so
    as many logits exist at a time. Raises ValueError for a shape that the config does not name,
    because nobody chose its microbatches.
    """
    microbatches = {size: accumulate for _, size, accumulate in train.batch_ramp}
    microbatches[train.batch_size] = train.accumulate
    lengths = {train.seq_len, *(length for _, length in train.length_ramp)}
    if length not in lengths:
        raise ValueError(f"rows of {length} tokens, and the config has {sorted(lengths)}")

    pieces = train.seq_len // length
    size, rest = divmod(rows, pieces)
    if rest or size not in microbatches:
        raise ValueError(
            f"a batch of {rows} rows of {length} tokens, and the config has batches of "
            f"{sorted(microbatches)} rows of {train.seq_len}"
        )
    return replace(
        train,
        batch_size=rows,
        accumulate=microbatches[size],
        batch_ramp=(),
        seq_len=length,
        length_ramp=(),
        loss_chunk=train.loss_chunk // pieces,
    )
