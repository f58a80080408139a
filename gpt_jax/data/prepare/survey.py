"""What has to be known of all documents before any of them is tokenized.

That is which documents are copies of earlier ones, and which characters occur. `scan` reads a unit,
`decide` looks at all scans. Of copies the first in the order of the input stays, across all
sources.

Memory: 25 bytes a document, and 430 where near copies are looked for, of which MinHash takes 256.
It is 590 where most documents have a near copy (measured with 400,000 documents).
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt_jax.data.prepare import duplicates, units
from gpt_jax.data.prepare.units import WORK, PrepareJob, Unit
from gpt_jax.errors import UsageError
from gpt_jax.files import replace_file

SIMILARITY = 0.8  # of near copies: Jaccard, of sets of shingles
TICK_DOCUMENTS = 1000  # between two signs of life


def parse_threshold(dedup: str) -> float | None:
    """The similarity from which texts are copies of each other.

    1 means equal texts, None means that copies stay. Raises UsageError for anything but none, exact
    and near[:SIMILARITY].
    """
    kind, _, number = dedup.partition(":")
    try:
        value = {"none": None, "exact": 1.0, "near": float(number or SIMILARITY)}[kind]
    except (KeyError, ValueError):
        value = -1.0
    if (value is not None and not 0 < value <= 1) or (number and kind != "near"):
        raise UsageError(
            f"--dedup={dedup}: expected none, exact, near or near:SIMILARITY with a similarity "
            f"between 0 and 1, such as near:{SIMILARITY}"
        )
    return value


def _near_threshold(job: PrepareJob) -> float | None:
    """The similarity from which texts are near copies; None if only equal ones count, or none."""
    dedup = job.settings.dedup
    return parse_threshold(dedup) if dedup.startswith("near") else None


# ---- one unit ----


def list_scan_files(unit: Unit) -> dict[str, str]:
    """What `scan` writes of the documents that the filters leave, by its name.

    That is their number in the unit, their hash, and their MinHash.
    """
    return {what: f"{WORK}/scan-{unit.name}.{what}" for what in ("numbers", "hashes", "minhash")}


def scan(
    job: PrepareJob, unit: Unit, tick: Callable[[int, int], None], *, wants_characters: bool
) -> dict:
    """Reads a unit, writes its scan files, and gives its marker.

    The marker also has `documents`, all that have text, and the `characters` that occur if they are
    wanted.
    """
    numbers = []
    hashes = []
    signatures = []
    characters = set()
    counts = units.Counts()
    near = _near_threshold(job) is not None

    documents = 0
    size = 0
    for text in units.read(job, unit, counts):
        numbers.append(text.number)
        hashes.append(text.hash)
        if near:
            signatures.append(duplicates.minhash(text.text))
        if wants_characters:
            characters.update(text.text)
        documents += 1
        size += len(text.text.encode())
        if documents == TICK_DOCUMENTS:
            tick(documents, size)
            documents = 0
            size = 0
    tick(documents, size)

    arrays = {"numbers": np.array(numbers, np.uint32), "hashes": np.array(hashes, np.uint64)}
    if near:
        arrays["minhash"] = np.array(signatures)
    names = list_scan_files(unit)
    files = {
        names[what]: replace_file(job.folder / names[what], array.tobytes())
        for what, array in arrays.items()
    }
    return units.write_marker(
        job,
        "scan",
        unit,
        files,
        counts,
        documents=counts.tally.documents,
        characters="".join(sorted(characters)),
    )


# ---- all units ----


def _load_signatures(job: PrepareJob, todo: Sequence[Unit], stays: np.ndarray) -> np.ndarray:
    """The signatures of the documents that stay. One unit is in memory beside them."""
    like = duplicates.minhash("")
    signatures = np.empty((int(stays.sum()), len(like)), like.dtype)
    start = 0
    filled = 0
    for unit in todo:
        raw = np.fromfile(job.folder / list_scan_files(unit)["minhash"], like.dtype)
        part = raw.reshape(-1, len(like))
        kept = part[stays[start : start + len(part)]]
        signatures[filled : filled + len(kept)] = kept
        start += len(part)
        filled += len(kept)
    return signatures


def decide(
    job: PrepareJob,
    todo: Sequence[Unit],
    scans: Sequence[dict],
    say: Callable[[str], None],
) -> tuple[list[str], int, int]:
    """Writes which documents of every unit stay, to its `units.keep_file`.

    Gives the SHA-256 of each such file, and how many exact and near copies go. `say` gets what a
    person must know of that.
    """
    names = [list_scan_files(unit) for unit in todo]
    parts = [np.fromfile(job.folder / name["hashes"], np.uint64) for name in names]
    hashes = np.concatenate(parts)
    stays = np.zeros(len(hashes), bool)
    stays[np.unique(hashes, return_index=True)[1]] = True  # the first of each
    exact = int(len(stays) - stays.sum())

    near = 0
    threshold = _near_threshold(job)
    if threshold is not None:
        signatures = _load_signatures(job, todo, stays)
        goes = duplicates.find_near_duplicates(signatures, threshold, say)
        stays[np.flatnonzero(stays)[goes]] = False
        near = int(goes.sum())

    keys = []
    start = 0
    for unit, marker, name, part in zip(todo, scans, names, parts, strict=True):
        keep = np.zeros(marker["documents"], bool)
        numbers = np.fromfile(job.folder / name["numbers"], np.uint32)
        keep[numbers] = stays[start : start + len(part)]
        keys.append(replace_file(job.folder / units.keep_file(unit), keep.tobytes()).sha256)
        start += len(part)
    return keys, exact, near
