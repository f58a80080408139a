"""Near-duplicate documents, found by MinHash (Broder 1997)."""

import functools
import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from gpt_jax.errors import UsageError, install_command

# Scripts written without spaces count by the character, everything else by the word.
UNITS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[^\\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
# So many shingles are hashed at once. Each takes `permutations` hashes of 4 bytes.
SHINGLES_AT_ONCE = 1 << 14
# 2^64 over the golden ratio, made odd.
MIX = np.uint64(0x9E3779B97F4A7C15)


def _shingle_hashes(text: str, size: int) -> Iterator[np.ndarray]:
    """uint32 hashes of every run of `size` units, in blocks. There is at least one.

    A unit is a word, or a character of Chinese, Japanese, Thai, Khmer, Lao or Burmese. Case and
    punctuation do not count. CRCs of units are combined by arithmetic, because hashing each joined
    run took most of the time.
    """
    words = UNITS.finditer(text.casefold())
    units = np.fromiter((zlib.crc32(word[0].encode()) for word in words), np.uint32)
    if not len(units):
        units = np.array([zlib.crc32(text.encode())], np.uint32)

    size = min(size, len(units))
    for at in range(0, len(units) - size + 1, SHINGLES_AT_ONCE):
        block = units[at : at + SHINGLES_AT_ONCE + size - 1].astype(np.uint64)
        yield np.unique(
            _mixed(block[i : len(block) - size + 1 + i] for i in range(size)) >> np.uint64(32)
        )


def _mixed(columns: Iterable[np.ndarray]) -> np.ndarray:
    """uint64 [N]: a hash of each row of uint32 columns, in their order.

    The upper half of the hash is the better one.
    """
    mixed = np.zeros((), np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * MIX + np.uint64(1)
        mixed ^= mixed >> np.uint64(29)
    return mixed * MIX


@functools.lru_cache
def _blank_minhash(permutations: int):
    """A MinHash of no text. Raises UsageError if the package is missing."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise UsageError(
            f"near-duplicates: need the package datasketch; {install_command('datasketch')}"
        ) from None
    return MinHash(permutations, seed=1, scheme="affine32", hashfunc=int)


def minhash(text: str, permutations: int = 64, shingle: int = 5) -> np.ndarray:
    """uint32 [permutations]: the signature of a text.

    The part in which two signatures agree estimates the Jaccard similarity of the texts' shingles
    (Broder 1997). The standard error is at most 1 / (2 sqrt(permutations)).
    """
    signature = _blank_minhash(permutations).copy()
    for hashes in _shingle_hashes(text, shingle):
        signature.update_batch(hashes)
    return signature.hashvalues.astype(np.uint32)


def choose_band_rows(permutations: int, threshold: float) -> int:
    """The most hashes in a band with which a pair at the threshold is found with probability 0.99.

    See Leskovec et al., Mining of Massive Datasets, section 3.4. Fewer hashes find more pairs. They
    only cost time, because they are compared.
    """
    most = 1
    for rows in range(1, permutations + 1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= 0.99:
            most = rows
    return most


def _shared_buckets(band: np.ndarray) -> np.ndarray:
    """int64 [N]: a number for each row of `band` [N, rows] that occurs more than once, else -1."""
    _, bucket, count = np.unique(_mixed(band.T), return_inverse=True, return_counts=True)
    return np.where(count[bucket] > 1, bucket, -1)


def find_near_duplicates(signatures: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """bool [N]: which documents are similar to an earlier one that stays.

    `signatures` are [N, permutations]. Similar means an estimate of `threshold` or more. So the
    first of a group stays, and every document that goes has a similar one that stays.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            f"threshold = {threshold}: the similarity of near-duplicates is above 0 and at most 1"
        )

    count, permutations = signatures.shape
    rows = choose_band_rows(permutations, threshold)
    starts = range(0, permutations - rows + 1, rows)
    buckets = np.stack([_shared_buckets(signatures[:, at : at + rows]) for at in starts], 1)

    staying: dict[tuple[int, int], list[int]] = {}  # (band, bucket) -> documents
    is_copy = np.zeros(count, bool)
    for i in np.flatnonzero((buckets >= 0).any(1)):
        keys = [(band, bucket) for band, bucket in enumerate(buckets[i].tolist()) if bucket >= 0]
        near = np.array(sorted({j for key in keys for j in staying.get(key, ())}), int)
        is_copy[i] = ((signatures[near] == signatures[i]).mean(1) >= threshold).any()
        if not is_copy[i]:
            for key in keys:
                staying.setdefault(key, []).append(int(i))
    return is_copy
