"""Which source each example comes from, as a pure function of the example's number.

Examples come in blocks. Every block holds each source's share exactly, shuffled within the block.
The n-th example of a source in the stream is the source's n-th row. So the stream keeps neither a
shuffle buffer nor a count of past examples. The idea is that of Levanter's block-deterministic
mixtures. Here, unlike there, a phase begins at exactly its example. Its blocks are counted from
that example, and a shorter block fills the gap before it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt_jax.data.stream.order import permute
from gpt_jax.errors import UsageError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Runs of equal blocks, made by `make`.

    Run r begins with example `begins[r]`. Each of its blocks has `counts[r, i]` examples of
    source i.
    """

    # int64 [runs, sources]. The sum of a row is the size of the run's blocks.
    counts: np.ndarray

    # int64 [runs], from 0. A run is made of whole blocks, and the last run has no end.
    begins: np.ndarray

    # float [runs, sources] of sum 1: each source's share in the phase that the run belongs to.
    weights: np.ndarray

    seed: int

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64 [runs]: examples in a block."""
        return self.counts.sum(axis=1)

    @functools.cached_property
    def _before(self) -> tuple[np.ndarray, np.ndarray]:
        """(blocks int64 [runs], examples of each source int64 [runs, sources]) before each run."""
        blocks = np.diff(self.begins) // self.sizes[:-1]
        drawn = np.cumsum(blocks[:, None] * self.counts[:-1], axis=0)
        return np.cumsum([0, *blocks]), np.concatenate([np.zeros_like(self.counts[:1]), drawn])

    def _run(self, index) -> np.ndarray:
        """The run that each example of `index` is in."""
        return np.searchsorted(self.begins, index, "right") - 1

    def assign(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [N], number within the source [N]) of examples `index`, int64 [N]."""
        run = self._run(index)
        blocks, drawn = self._before
        block, place = np.divmod(index - self.begins[run], self.sizes[run])
        for r in np.unique(run):
            here = run == r
            place[here] = permute(
                place[here], int(self.sizes[r]), self.seed, blocks[r] + block[here]
            )

        # Before the shuffle a block has all examples of the first source, then the next one's.
        counts = self.counts[run]
        ends = np.cumsum(counts, axis=1)
        source = (place[:, None] >= ends).sum(1)

        def pick(table):
            return np.take_along_axis(table, source[:, None], 1)[:, 0]

        return source, pick(drawn[run]) + block * pick(counts) + place - pick(ends - counts)

    def find_difference(self, other: "Mixture") -> int | None:
        """The first example from which `other` may draw otherwise, or None if it never does."""
        runs = zip(self.begins, self.counts, strict=True)
        others = zip(other.begins, other.counts, strict=True)
        mine = {(int(begin), *map(int, counts)) for begin, counts in runs}
        theirs = {(int(begin), *map(int, counts)) for begin, counts in others}
        return min((begin for begin, *_ in mine ^ theirs), default=None)

    def shares(self, index: int) -> np.ndarray:
        """float [sources] of sum 1: each source's share in the phase that example `index` is in."""
        return self.weights[self._run(index)]

    def drawn(self, examples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `examples` come from each source."""
        run = int(self._run(examples))
        block, rest = divmod(examples - int(self.begins[run]), int(self.sizes[run]))
        last = self.assign(examples - rest + np.arange(rest))[0]
        return (
            self._before[1][run]
            + block * self.counts[run]
            + np.bincount(last, minlength=self.counts.shape[1])
        )


def make(counts: np.ndarray, begins: Sequence[int], seed: int) -> Mixture:
    """The mixture of phases that begin with examples `begins`, which rise from 0.

    The blocks of a phase hold `counts` (int64 [phases, sources], rows of one sum). The rest of a
    phase after its whole blocks is a block of its own, with the shares by largest remainders.
    """
    runs = []  # (begin, counts, shares)
    for phase, (row, begin) in enumerate(zip(counts, begins, strict=True)):
        size = int(row.sum())
        shares = row / row.sum()
        is_last = phase + 1 == len(begins)
        rest = 0 if is_last else (begins[phase + 1] - begin) % size
        if is_last or begins[phase + 1] - begin >= size:
            runs.append((begin, row, shares))
        if rest:
            runs.append((begins[phase + 1] - rest, _remainders(shares, rest), shares))

    return Mixture(
        counts=np.array([counts for _, counts, _ in runs]),
        begins=np.array([begin for begin, _, _ in runs], np.int64),
        weights=np.array([shares for _, _, shares in runs]),
        seed=seed,
    )


LAST_TOKEN = 10**18  # the last token at which a phase may begin


def check(phases: Sequence[tuple[int, Sequence[float]]], names: Sequence[str]) -> None:
    """Raises UsageError for phases that make no mixture, whatever the sources hold.

    A phase is (first token, a weight for each of the sources `names`). The first phase is
    config.data.sources itself, and the others are config.data.phases.
    """
    for i, (token, weights) in enumerate(phases):
        field = f"config.data.phases[{i - 1}]" if i else "config.data.sources"
        if len(weights) != len(names):
            raise UsageError(
                f"{field} = {weights}: expected {len(names)} weights, for {', '.join(names)}"
            )
        if token < (i > 0) or token > LAST_TOKEN:
            raise UsageError(f"{field} begins at token {token:,}; expected 1 to {LAST_TOKEN:,}")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise UsageError(
                f"{field}: the weights {tuple(weights)} must be 0 or more, and not all 0"
            )
        if i and token <= phases[i - 1][0]:
            raise UsageError(
                f"{field} begins at token {token:,}, not after the previous phase; "
                "give phases in rising order"
            )


def _remainders(shares: np.ndarray, total: int) -> np.ndarray:
    """int64 [sources] that sum to `total`, by largest remainders."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def apportion(shares: np.ndarray, block: int, names: tuple[str, ...]) -> np.ndarray:
    """int64 [sources] that sum to `block`: the shares by largest remainders.

    `shares` are float [sources] of any sum. Raises UsageError if a share above 0 gets no example.
    """
    shares = shares / shares.max()
    counts = _remainders(shares, block)
    for name, share, count in zip(names, shares, counts, strict=True):
        if share > 0 and not count:
            raise UsageError(
                f"config.data.block = {block}: the share {share / shares.sum():.2g} of source "
                f"{name} is less than one example of a block; raise it, or the weight"
            )
    return counts
