"""Which source each example comes from (called by pipeline): a pure function of the example's number.

Examples are dealt in blocks. Every block holds each source's share exactly, shuffled within the block, and the n-th
example of a source in the stream is its own n-th row, so that neither a shuffle buffer nor a count of what was drawn is
kept (after Levanter's block-deterministic mixtures, data/mixture.py).
"""

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from gpt_jax.data.order import permute
from gpt_jax.errors import UsageError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Stages of shares; `counts[s, i]` examples of source i in every block of stage s, which begins with block
    `begins[s]`."""

    counts: np.ndarray  # int64 [stages, sources]; every row sums to `block`
    begins: np.ndarray  # int64 [stages], the first is 0
    block: int  # examples
    seed: int

    def _drawn_before(self) -> np.ndarray:
        """int64 [stages, sources]: examples of each source before each stage."""
        blocks = np.diff(self.begins)
        drawn = np.zeros_like(self.counts)
        drawn[1:] = np.cumsum(blocks[:, None] * self.counts[:-1], axis=0)
        return drawn

    def assign(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [N], number of the example within its source [N]) of examples `index` (int64 [N])."""
        block, place = np.divmod(index, self.block)
        stage = np.searchsorted(self.begins, block, "right") - 1
        place = permute(place, self.block, self.seed, block)
        ends = np.cumsum(self.counts[stage], axis=1)
        source = (place[:, None] >= ends).sum(1)
        pick = lambda table: np.take_along_axis(table, source[:, None], 1)[:, 0]
        counts = self.counts[stage]
        rank = place - pick(ends - counts)
        return source, pick(self._drawn_before()[stage]) + (block - self.begins[stage]) * pick(counts) + rank

    def shares(self, index: int) -> np.ndarray:
        """float [sources] of sum 1: the part of the examples from each source in the stage that example `index` is
        in."""
        return self.counts[np.searchsorted(self.begins, index // self.block, "right") - 1] / self.block

    def drawn(self, examples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `examples` come from each source."""
        block, rest = divmod(examples, self.block)
        stage = int(np.searchsorted(self.begins, block, "right")) - 1
        drawn = self._drawn_before()[stage] + (block - self.begins[stage]) * self.counts[stage]
        last = self.assign(block * self.block + np.arange(rest))[0]
        return drawn + np.bincount(last, minlength=self.counts.shape[1])


LAST_TOKEN = 10**18  # at which a stage may begin


def check(stages: Sequence[tuple[int, Sequence[float]]], names: Sequence[str]) -> None:
    """UsageError for stages (first token, a weight for each of the sources `names`) that can be no mixture, whatever
    the sources hold; the first of them is config.data.sources itself, the others config.data.stages."""
    for i, (token, weights) in enumerate(stages):
        field = f"config.data.stages[{i - 1}]" if i else "config.data.sources"
        if len(weights) != len(names):
            raise UsageError(f"{field} = {weights}: expected {len(names)} weights, for {', '.join(names)}")
        if token < (i > 0) or token > LAST_TOKEN:
            raise UsageError(f"{field} begins at token {token:,}; expected 1 to {LAST_TOKEN:,}")
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise UsageError(f"{field}: the weights {tuple(weights)} must be 0 or more, and not all 0")
        if i and token <= stages[i - 1][0]:
            raise UsageError(f"{field} begins at token {token:,}, before the stage before it; let stages rise")


def apportion(shares: np.ndarray, block: int, names: tuple[str, ...]) -> np.ndarray:
    """int64 [sources] that sum to `block`: each share (float [sources], any sum) by largest remainders. UsageError for
    a share that is not 0 and gets no example."""
    shares = shares / shares.max()
    exact = shares / shares.sum() * block
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
    for name, share, count in zip(names, shares, counts):
        if share > 0 and not count:
            raise UsageError(f"config.data.block = {block}: the share {share / shares.sum():.2g} of source {name} is "
                             "less than one example of a block; raise it, or the weight")
    return counts
