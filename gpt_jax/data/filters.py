"""What a document must be, and what is made of it: a table of small pure functions (called by
prepare).

A filter is typed `name:argument`, or `module:function` for one of the user's own. It takes a text
and gives the text it made of it, or None for a document that is left out. Duplicates need a
decision over all documents: their pure parts come last.
"""

import functools
import importlib
import inspect
import operator
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.shards import digest, digest_of
from gpt_jax.errors import UsageError

Apply = Callable[[str], str | None]
LANGUAGE_CHARACTERS = 2000  # of a document, by which its language is judged: py3langid reads 4 MB/s
CONTROLS = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), 127]
)  # all but tab, line feed and carriage return


class Filter(NamedTuple):
    usage: str
    make: Callable[
        ..., Apply
    ]  # of the arguments as typed; ValueError or TypeError for those of no use


# ---- measures, and filters that bound them ----


def _utf8_bytes(text: str) -> int:
    return len(text.encode())


def _letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / len(text)


def _repeated(text: str) -> float:
    """Part of the characters that stand in lines seen before (Rae et al. 2021, Gopher, appendix
    A)."""
    lines = [line for line in text.split("\n") if line.strip()]
    return 1 - sum(map(len, set(lines))) / max(sum(map(len, lines)), 1)


def _limit(text: str, kind=int, most: float = 2**63):
    if not 0 <= kind(text) <= most:
        raise ValueError(f"{text} is not from 0 to {most}")
    return kind(text)


_part = functools.partial(_limit, kind=float, most=1)


def _bound(
    measure: Callable[[str], float],
    holds: Callable[[float, float], bool],
    number: Callable[[str], float],
):
    """The maker of a filter that keeps a text whose `measure` holds against the limit typed."""

    def make(limit: str) -> Apply:
        limit = number(limit)
        return lambda text: text if holds(measure(text), limit) else None

    return make


# ---- language ----


@functools.lru_cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UsageError(
            "--filters=language: needs the package py3langid; pip install 'gpt_jax[filters]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(names: str, probability: str = "0") -> Apply:
    """py3langid's best guess is one of `names` (joined by , or +), and its probability at least
    so much."""
    wanted, least, identifier = set(re.split("[,+]", names)), _part(probability), _identifier()
    if unknown := wanted - set(identifier.labels):
        raise ValueError(
            f"{' '.join(sorted(unknown))} unknown; known are {' '.join(sorted(identifier.labels))}"
        )

    def apply(text: str) -> str | None:
        guess, likely = identifier.classify(text[:LANGUAGE_CHARACTERS])
        return text if guess in wanted and likely >= least else None

    return apply


# ---- transforms ----


def _normalize(form: str) -> Apply:
    unicodedata.normalize(
        form, "\u00e9"
    )  # ValueError for a form that does not exist, though not on an empty text
    return functools.partial(unicodedata.normalize, form)


def _replace(pattern: str, new: str = "") -> Apply:
    try:
        compiled = re.compile(pattern)
        compiled.sub(new, "")
    except (re.error, IndexError) as error:
        raise ValueError(f"not a regular expression and its replacement: {error}") from None
    return lambda text: compiled.sub(new, text)


def _plain(function: Apply) -> Callable[[], Apply]:
    return lambda: function


FILTERS = {
    "min_chars": Filter("min_chars:N", _bound(len, operator.ge, _limit)),
    "max_chars": Filter("max_chars:N", _bound(len, operator.le, _limit)),
    "min_bytes": Filter("min_bytes:N", _bound(_utf8_bytes, operator.ge, _limit)),
    "max_bytes": Filter("max_bytes:N", _bound(_utf8_bytes, operator.le, _limit)),
    "min_letters": Filter("min_letters:PART", _bound(_letters, operator.ge, _part)),
    "max_repeated": Filter("max_repeated:PART", _bound(_repeated, operator.le, _part)),
    "language": Filter("language:zh,en[:PROBABILITY]", _language),
    "normalize": Filter("normalize:NFC|NFKC|NFD|NFKD", _normalize),
    "strip": Filter("strip", _plain(str.strip)),
    "newlines": Filter(
        "newlines", _plain(lambda text: text.replace("\r\n", "\n").replace("\r", "\n"))
    ),
    "controls": Filter("controls", _plain(lambda text: text.translate(CONTROLS))),
    "blank_lines": Filter("blank_lines", _plain(lambda text: re.sub(r"\n{3,}", "\n\n", text))),
    "replace": Filter("replace:REGEX[:NEW]", _replace),
}
KNOWN = f"{' '.join(row.usage for row in FILTERS.values())}, or your own module:function"


# ---- chains ----


def _import(spec: str) -> Callable:
    """The function of `module:function`."""
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UsageError(f"--filters={spec!r}: no such filter; there are {KNOWN}")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module does when it is imported
        raise UsageError(
            f"--filters={spec!r}: {type(error).__name__}: {error}; a module must be importable "
            f"(PYTHONPATH); filters are {KNOWN}"
        ) from None


def code(specs: Iterable[str]) -> dict[str, str]:
    """{spec: digest} of the user's own filters, as their source files are now: of the module
    named, and of the one that the function was written in. What these import in turn is not
    looked at."""
    found = {}
    for spec in specs:
        if spec.partition(":")[0] not in FILTERS:
            function = inspect.unwrap(_import(spec))
            written = getattr(function, "__code__", None)
            files = {
                getattr(sys.modules[spec.partition(":")[0]], "__file__", None),
                written and written.co_filename,
            }
            found[spec] = digest([_sha256(file) for file in sorted(filter(None, files))])
    return found


def _sha256(file: str) -> str:
    try:
        return digest_of(Path(file)).sha256
    except OSError:  # a module in a zip archive or in memory
        return ""


def _own(spec: str) -> Apply:
    """The user's `module:function`, its mistakes turned into one line."""
    function = _import(spec)

    def apply(text: str) -> str | None:
        try:
            made = function(text)
        except Exception as error:
            raise UsageError(
                f"--filters={spec!r}: raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(made, str | None):
            raise UsageError(
                f"--filters={spec!r}: gave {type(made).__name__}, expected text or None"
            )
        return made

    return apply


def _make(spec: str) -> Apply:
    name, *arguments = spec.split(":", 2)
    if name not in FILTERS:
        return _own(spec)
    try:
        return FILTERS[name].make(*arguments)
    except (ValueError, TypeError) as error:
        reason = "" if isinstance(error, TypeError) else f" ({error})"
        raise UsageError(f"--filters={spec!r}: expected {FILTERS[name].usage}{reason}") from None


class Chain:
    """Filters one after the other; pickled as what was typed, and made again in the process that
    gets it."""

    def __init__(self, specs: tuple[str, ...]):
        self.specs = tuple(specs)
        self.steps = [(spec, _make(spec)) for spec in self.specs]

    def __call__(self, text: str) -> tuple[str | None, str]:
        """(text, "") or (None, the filter that left it out as typed). A text that became empty
        is left out."""
        for spec, apply in self.steps:
            text = apply(text)
            if not text:
                return None, spec
        return text, ""

    def __reduce__(self):
        return Chain, (self.specs,)


def parse(specs: tuple[str, ...]) -> Chain:
    """The chain of filters typed. UsageError for an unknown one (listing the table) and for
    arguments of no use."""
    return Chain(specs)


# ---- duplicates ----

# Scripts written without spaces count by the character, everything else by the word.
UNITS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]|[^\\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
SHINGLES_AT_ONCE = 1 << 14  # times `permutations` hashes of 4 bytes are held
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd


def _shingle_hashes(text: str, size: int) -> Iterator[np.ndarray]:
    """uint32 hashes, in blocks, of every run of `size` units (words; characters of Chinese,
    Japanese, Thai, Khmer, Lao, Burmese), case and punctuation aside; at least one. CRCs of units
    are combined by arithmetic, as hashing each joined run was most of the time."""
    units = np.fromiter(
        (zlib.crc32(found[0].encode()) for found in UNITS.finditer(text.casefold())), np.uint32
    )
    units = units if len(units) else np.array([zlib.crc32(text.encode())], np.uint32)
    size = min(size, len(units))
    for at in range(0, len(units) - size + 1, SHINGLES_AT_ONCE):
        block = units[at : at + SHINGLES_AT_ONCE + size - 1].astype(np.uint64)
        yield np.unique(
            _mixed(block[i : len(block) - size + 1 + i] for i in range(size)) >> np.uint64(32)
        )


def _mixed(columns: Iterable[np.ndarray]) -> np.ndarray:
    """uint64 [N]: a number for each row of uint32 columns, in their order; its upper half is the
    better one."""
    mixed = np.uint64(0)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * MIX + np.uint64(1)
        mixed ^= mixed >> np.uint64(29)
    return mixed * MIX


@functools.lru_cache
def _blank_minhash(permutations: int):
    try:
        from datasketch import MinHash
    except ImportError:
        raise UsageError(
            "near-duplicates: need the package datasketch; pip install 'gpt_jax[dedup]'"
        ) from None
    return MinHash(permutations, seed=1, scheme="affine32", hashfunc=int)


def minhash(text: str, permutations: int = 64, shingle: int = 5) -> np.ndarray:
    """uint32 [permutations]: the part in which two of them agree estimates the Jaccard
    similarity of the texts' shingles (Broder 1997), with a standard error of at most 1 / (2
    sqrt(permutations))."""
    signature = _blank_minhash(permutations).copy()
    for hashes in _shingle_hashes(text, shingle):
        signature.update_batch(hashes)
    return signature.hashvalues.astype(np.uint32)


def band_rows(permutations: int, threshold: float) -> int:
    """Hashes to a band: as many as find a pair at the threshold with probability 0.99 (Leskovec
    et al., Mining of Massive Datasets, section 3.4); what is found beyond that is compared, so
    that too few cost time only."""
    caught = [
        rows
        for rows in range(1, permutations + 1)
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= 0.99
    ]
    return max(caught, default=1)


def _shared_buckets(band: np.ndarray) -> np.ndarray:
    """int64 [N]: a number for rows of `band` [N, rows] that occur more than once, -1 for the
    others."""
    _, bucket, count = np.unique(_mixed(band.T), return_inverse=True, return_counts=True)
    return np.where(count[bucket] > 1, bucket, -1)


def near_duplicates(signatures: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """bool [N] of MinHash signatures [N, permutations]: whether a document's estimated
    similarity to an earlier one that stays is `threshold` or more. So the first of a group
    stays, and what goes has something like it that stays."""
    if not 0 < threshold <= 1:
        raise UsageError(
            f"threshold = {threshold}: the similarity of near-duplicates is above 0 and at most 1"
        )
    count, permutations = signatures.shape
    rows = band_rows(permutations, threshold)
    buckets = np.stack(
        [
            _shared_buckets(signatures[:, at : at + rows])
            for at in range(0, permutations - rows + 1, rows)
        ],
        1,
    )
    staying: dict[tuple[int, int], list[int]] = {}
    found = np.zeros(count, bool)
    for i in np.flatnonzero((buckets >= 0).any(1)):
        keys = [(band, bucket) for band, bucket in enumerate(buckets[i].tolist()) if bucket >= 0]
        near = np.array(sorted({j for key in keys for j in staying.get(key, ())}), int)
        found[i] = ((signatures[near] == signatures[i]).mean(1) >= threshold).any()
        if not found[i]:
            for key in keys:
                staying.setdefault(key, []).append(int(i))
    return found
