"""Which row comes when: pure functions of (seed, index), vectorised, O(1) each.

The n-th row of the stream is computed from n alone, without a shuffle buffer or other state. So
seeking costs nothing, and the order does not depend on how the rows are split over processes.
"""

import math

import numpy as np

ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), uint64 [...] -> uint64 [...].

    Every output bit depends on every input bit.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, *words) -> np.ndarray:
    """The uint64 hash of `seed` and `words`, in an array of shape [1] or more.

    `words` are integers or integer arrays that broadcast together.
    """
    state = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    for word in words:
        state = mix(
            state * np.uint64(0xD1342543DE82EF95)
            + np.atleast_1d(np.asarray(word)).astype(np.uint64)
        )
    return state


def random_below(limit: int, seed: int, index: np.ndarray) -> np.ndarray:
    """int64 [N], one for each `index`, uniform in [0, limit).

    The bias of the modulus is limit / 2**64.
    """
    return (random_bits(seed, index) % np.uint64(limit)).astype(np.int64)


def permute(index: np.ndarray, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `index` goes in the permutation of [0, size) that belongs to (seed, epoch [N]).

    `index` is int64 [N] in [0, size). With index = left * wide + right, a generalised Feistel
    network on pairs (left, right) is a bijection of [0, tall * wide). What it adds to a half may be
    anything. Walking its cycle until the value falls below `size` restricts it to [0, size) (Black,
    Rogaway 2002). Hardly any value walks twice, because tall * wide exceeds `size` by less than
    `tall`.
    """
    tall = np.uint64(math.isqrt(size - 1) + 1)
    wide = np.uint64(-(-size // int(tall)))
    keys = random_bits(seed, np.asarray(epoch)[None, :], np.arange(ROUNDS)[:, None])

    out = np.asarray(index).astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        left = out[walking] // wide
        right = out[walking] % wide
        for step, key in enumerate(keys[:, walking]):
            if step % 2:
                right = (right + mix(left ^ key) % wide) % wide
            else:
                left = (left + mix(right ^ key) % tall) % tall
        out[walking] = left * wide + right
        walking = walking[out[walking] >= np.uint64(size)]
    return out.astype(np.int64)
