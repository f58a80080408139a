"""Near-duplicate documents, found by MinHash (Broder 1997).

Time and memory grow with the number of documents, whatever the documents have in common.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator

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
# So many signatures are looked at together.
AT_ONCE = 1 << 15
# A document is compared with so many of those that share a rare hash. Each takes some 0.1 us.
COMPARED = 256
# 2^64 over the golden ratio, made odd.
MIX = np.uint64(0x9E3779B97F4A7C15)


def _shingle_hashes(text: str, size: int) -> Iterator[np.ndarray]:
    """uint32 hashes of every run of `size` units, in blocks. There is at least one block.

    A unit is a word, or a character of Chinese, Japanese, Thai, Khmer, Lao or Burmese. Case and
    punctuation do not count. CRCs of units are combined by arithmetic, because hashing each joined
    run took most of the time.
    """
    units = np.fromiter(map(_hash_unit, UNITS.findall(text.casefold())), np.uint32)
    if not len(units):
        units = np.array([_hash_unit(text)], np.uint32)

    size = min(size, len(units))
    for at in range(0, len(units) - size + 1, SHINGLES_AT_ONCE):
        block = units[at : at + SHINGLES_AT_ONCE + size - 1].astype(np.uint64)
        columns = (block[i : len(block) - size + 1 + i] for i in range(size))
        yield _mixed(columns) >> np.uint64(32)


# Most words of a text are among the frequent ones of its language.
@functools.lru_cache(1 << 16)
def _hash_unit(unit: str) -> int:
    return zlib.crc32(unit.encode())


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
        signature.update_batch(hashes.tolist())
    return signature.hashvalues.astype(np.uint32)


def count_agreeing(permutations: int, threshold: float) -> int:
    """In how many hashes, at least, two signatures of this similarity agree."""
    return next(count for count in range(permutations + 1) if count / permutations >= threshold)


def _rank_frequency(signatures: np.ndarray) -> np.ndarray:
    """uint8 [N, permutations]: how frequent each hash is at its place, 0 if it is alone.

    Four ranks are a doubling. Equal hashes at one place have equal ranks.
    """
    ranks = np.empty(signatures.shape, np.uint8)
    for place in range(signatures.shape[1]):
        order = np.argsort(signatures[:, place])
        column = signatures[order, place]
        is_first = np.ones(len(column), bool)
        is_first[1:] = column[1:] != column[:-1]
        del column
        counts = np.diff(np.flatnonzero(is_first), append=len(order))
        ranks[order, place] = np.repeat((4 * np.log2(counts)).astype(np.uint8), counts)
    return ranks


def _list_rare(signatures: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 keys of rare hashes, where those of each document begin), then the end.

    The keys of a document are those of its `length` rarest hashes, without hashes that no other
    document has. Two hashes with one key only cost a comparison.
    """
    ranks = _rank_frequency(signatures)
    blocks = [slice(at, at + AT_ONCE) for at in range(0, len(ranks), AT_ONCE)]
    begins = np.zeros(len(ranks) + 1, np.int64)
    for block in blocks:
        rarest = np.sort(ranks[block], axis=1)[:, :length]
        begins[1:][block] = np.count_nonzero(rarest, axis=1)
    np.cumsum(begins, out=begins)

    keys = np.empty(begins[-1], np.uint32)
    for block in blocks:
        # Stable, so that hashes of equal rank have one order in all documents.
        rarest = np.argsort(ranks[block], axis=1, kind="stable")[:, :length]
        document, column = np.nonzero(np.take_along_axis(ranks[block], rarest, 1))
        place = rarest[document, column]
        start = begins[block.start]
        hashes = _mixed([place, signatures[block][document, place]]) >> np.uint64(32)
        keys[start : start + len(place)] = hashes
    return keys, begins


class Shelves:
    """The documents that stay, on a shelf for each key."""

    def __init__(self, keys: np.ndarray):
        order = np.argsort(keys)
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[order[1:]] != keys[order[:-1]]
        self.starts = np.flatnonzero(is_first)
        self.stops = self.starts.copy()
        self.shelf = np.empty(len(keys), np.uint32)  # of each key
        self.shelf[order] = np.cumsum(is_first, dtype=np.uint32) - np.uint32(1)
        self.documents = np.zeros(len(keys), np.uint32)  # shelf after shelf

    def find(self, shelves: list[int]) -> tuple[np.ndarray, bool]:
        """(the last COMPARED documents of each shelf, whether a shelf has more)."""
        parts = [np.zeros(0, np.uint32)]
        has_more = False
        for shelf in shelves:
            start = int(self.starts[shelf])
            stop = int(self.stops[shelf])
            has_more |= stop - start > COMPARED
            if stop > start:
                parts.append(self.documents[max(start, stop - COMPARED) : stop])
        return np.unique(np.concatenate(parts)), has_more

    def add(self, shelves: list[int], document: int) -> None:
        """Puts a document on its shelves."""
        for shelf in shelves:
            self.documents[self.stops[shelf]] = document
            self.stops[shelf] += 1


def find_near_duplicates(
    signatures: np.ndarray,
    threshold: float = 0.8,
    say: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """bool [N]: which documents are similar to an earlier one that stays.

    `signatures` are [N, permutations]. Similar means an estimate of `threshold` or more. So the
    first of a group stays, and every document that goes has a similar one that stays.

    Two signatures that agree in `a` of `p` hashes share one of the `p - a + 1` rarest hashes of
    each (prefix filtering; Chaudhuri et al. 2006, Bayardo et al. 2007). So only documents that
    share a rare hash are compared, and texts of one template are not: what they share is frequent.
    If they share so much that it is among their rarest hashes, a document is compared with the last
    COMPARED of them alone. `say` tells how often that was, because near copies may then stay.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            f"threshold = {threshold}: the similarity of near-duplicates is above 0 and at most 1"
        )

    count, permutations = signatures.shape
    is_copy = np.zeros(count, bool)
    least = count_agreeing(permutations, threshold)
    keys, begins = _list_rare(signatures, permutations - least + 1)
    shelves = Shelves(keys)
    del keys

    unsure = 0
    for i in np.flatnonzero(np.diff(begins)).tolist():
        # A document may have one key twice, for two hashes.
        mine = list(dict.fromkeys(shelves.shelf[begins[i] : begins[i + 1]].tolist()))
        near, has_more = shelves.find(mine)
        is_copy[i] = len(near) and ((signatures[near] == signatures[i]).sum(1) >= least).any()
        if not is_copy[i]:
            shelves.add(mine, i)
            unsure += has_more
    if unsure:
        say(
            f"near copies: {unsure:,} documents were compared with the last {COMPARED} of each "
            "kind of many that are almost as similar, so some of them may be near copies of others"
        )
    return is_copy
