"""The rows of each update, and so the examples that it reads.

A run begins with `train.batch_size`. Later sizes come from `train.batch_ramp`, or from a resume
with another batch size. Updates are counted from 0 here, so that update n is also batch n.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpt_jax.config.run_fields import Train


class Level(NamedTuple):
    """Successive updates of one batch size."""

    step: int  # updates before it
    example: int  # its first example
    size: int  # rows of each of its updates


@dataclass(frozen=True)
class BatchSizes:
    """A piecewise linear map from updates to examples. It depends on no mesh and no process.

    The first level begins at 0, and the last one has no end.
    """

    levels: tuple[Level, ...]

    def level(self, step: int) -> Level:
        """The level of the update that comes after `step` updates."""
        return self.levels[bisect_right(self.levels, step, key=_step_of) - 1]

    def size(self, step: int) -> int:
        """The rows of the update that comes after `step` updates."""
        return self.level(step).size

    def examples(self, step: int) -> int:
        """How many examples the first `step` updates read. The next update begins with that one."""
        level = self.level(step)
        return level.example + (step - level.step) * level.size

    def sizes_from(self, step: int) -> set[int]:
        """The rows of all updates that come after `step` updates."""
        first = self.levels.index(self.level(step))
        return {level.size for level in self.levels[first:]}

    def pairs(self, end: int) -> list[tuple[int, int]]:
        """(updates before it, rows) of each level that begins before `end`, as a checkpoint has."""
        return [(level.step, level.size) for level in self.levels if level.step < end]


def _step_of(level: Level) -> int:
    return level.step


def read_batch_sizes(pairs: Iterable[Sequence[int]]) -> BatchSizes:
    """The BatchSizes of (updates before it, rows) for each level.

    Raises ValueError if the levels do not rise from 0, or if one has no rows.
    """
    levels: list[Level] = []
    for step, size in pairs:
        last = levels[-1] if levels else Level(-1, 0, 0)
        is_first_at_0 = bool(levels) or step == 0
        if not is_first_at_0 or step <= last.step or size < 1:
            raise ValueError(f"no batch sizes that rise from step 0: ({step}, {size})")
        if size != last.size:
            example = last.example + (step - last.step) * last.size
            levels.append(Level(step, example, size))

    if not levels:
        raise ValueError("no batch sizes")
    return BatchSizes(tuple(levels))


def find_ramp_entry(train: Train, example: int) -> int | None:
    """Which entry of `train.batch_ramp` an update has that begins with `example`.

    It is None before the first entry, where `train.batch_size` counts.
    """
    tokens = example * train.seq_len
    begun = [token for token, _, _ in train.batch_ramp if token <= tokens]
    return len(begun) - 1 if begun else None


def make_batch_sizes(train: Train, past: BatchSizes | None = None, step: int = 0) -> BatchSizes:
    """The batch sizes of a run: those of its first `step` updates from `past`, then the config's.

    A size counts from the first update at or after its token. The tokens of the past count as well,
    so a run that resumes with the same config has the sizes of one that was never stopped.
    """
    pairs = past.pairs(step) if past else []
    example = past.examples(step) if past else 0

    def wanted_size() -> int:
        entry = find_ramp_entry(train, example)
        return train.batch_size if entry is None else train.batch_ramp[entry][1]

    pairs.append((step, wanted_size()))
    for token, _, _ in train.batch_ramp:
        missing = -(-token // train.seq_len) - example
        if missing > 0:
            updates = -(-missing // pairs[-1][1])
            step += updates
            example += updates * pairs[-1][1]
            pairs.append((step, wanted_size()))
    return read_batch_sizes(pairs)


def list_levels(train: Train) -> list[Train]:
    """`train` at each of its batch sizes: first `train.batch_size`, then the ramp's."""
    sizes = [train.batch_size, *(size for _, size, _ in train.batch_ramp)]
    return [at_batch_size(train, size) for size in sizes]


def at_batch_size(train: Train, size: int) -> Train:
    """`train` without a ramp, with the batch size `size` and the microbatches that go with it.

    Raises ValueError for a size that the config does not name, because nobody chose its
    microbatches.
    """
    microbatches = {rows: accumulate for _, rows, accumulate in train.batch_ramp}
    microbatches[train.batch_size] = train.accumulate
    if size not in microbatches:
        raise ValueError(f"a batch of {size} rows, and the config has {sorted(microbatches)}")
    return replace(train, batch_size=size, accumulate=microbatches[size], batch_ramp=())
