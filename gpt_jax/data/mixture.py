"""Which source each example comes from (called by pipeline): a pure function of the example's number.

Examples are dealt in blocks. Every block holds each source's share exactly, shuffled within the block, and the n-th
example of a source in the stream is its own n-th row, so that neither a shuffle buffer nor a count of what was drawn is
kept (after Levanter's block-deterministic mixtures, data/mixture.py).
"""

from dataclasses import dataclass

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

    def drawn(self, examples: int) -> np.ndarray:
        """int64 [sources]: how many of the first `examples` come from each source."""
        block, rest = divmod(examples, self.block)
        stage = int(np.searchsorted(self.begins, block, "right")) - 1
        drawn = self._drawn_before()[stage] + (block - self.begins[stage]) * self.counts[stage]
        last = self.assign(block * self.block + np.arange(rest))[0]
        return drawn + np.bincount(last, minlength=self.counts.shape[1])


def apportion(shares: np.ndarray, block: int, names: tuple[str, ...]) -> np.ndarray:
    """int64 [sources] that sum to `block`: each share (float [sources], any sum) by largest remainders. UsageError for a
    share that is not 0 and gets no example."""
    shares = shares / shares.max()
    exact = shares / shares.sum() * block
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
    for name, share, count in zip(names, shares, counts):
        if share > 0 and not count:
            raise UsageError(f"config.data.block = {block}: the share {share / shares.sum():.2g} of source {name} is less "
                             "than one example of a block; raise it, or the weight")
    return counts
