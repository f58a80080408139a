"""Which row comes when: pure functions of (seed, index), vectorised, O(1) each (called by rows).

No shuffle buffer and no state: the n-th row of the stream is computed from n alone, so seeking
costs nothing and the order is the same however the rows are dealt out.
"""

import math

import numpy as np

ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), uint64 [...]: every output bit by every
    input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, *words) -> np.ndarray:
    """uint64 hash of `seed` and of `words`, integers or integer arrays that broadcast together
    (shape [1] at least)."""
    state = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    for word in words:
        state = mix(
            state * np.uint64(0xD1342543DE82EF95)
            + np.atleast_1d(np.asarray(word)).astype(np.uint64)
        )
    return state


def random_below(limit: int, seed: int, index: np.ndarray) -> np.ndarray:
    """int64 [N], uniform in [0, limit), one per `index` (the bias of the modulus is limit /
    2**64)."""
    return (random_bits(seed, index) % np.uint64(limit)).astype(np.int64)


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `index` (int64 [N], in [0, size)) goes in the permutation of [0, size) that belongs to
    (seed, epoch [N]).

    A generalised Feistel network on pairs (left, right), index = left * wide + right, is a
    bijection of [0, tall * wide) whatever is added to either half; walking the cycle until the
    value falls below `size` restricts it to [0, size) (Black, Rogaway 2002). tall * wide exceeds
    `size` by less than `tall`, so hardly any value walks twice.
    """
    tall = np.uint64(math.isqrt(size - 1) + 1)
    wide = np.uint64(-(-size // int(tall)))
    keys = random_bits(seed, np.asarray(epoch)[None, :], np.arange(ROUNDS)[:, None])
    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] // wide, out[walking] % wide
        for step, key in enumerate(keys[:, walking]):
            if step % 2:
                right = (right + mix(left ^ key) % wide) % wide
            else:
                left = (left + mix(right ^ key) % tall) % tall
        out[walking] = left * wide + right
        walking = walking[out[walking] >= np.uint64(size)]
    return out.astype(np.int64)
