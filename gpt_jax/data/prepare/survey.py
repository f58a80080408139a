"""What has to be known of all documents before any of them is tokenized: which are copies of
earlier ones, and which characters occur (called by prepare, between its two phases, and by worker
processes).

Of copies the first in the order of the input stays, across all sources. Memory: 17 bytes a
document; for near copies another 256 of MinHash and 8 a band (see filters.near_duplicates).
"""

from collections.abc import Callable, Sequence

import numpy as np

from gpt_jax.data.prepare import duplicates, units
from gpt_jax.data.prepare.units import WORK, PrepareJob, Unit
from gpt_jax.errors import UsageError
from gpt_jax.files import replace_file

SIMILARITY = 0.8  # of near copies: Jaccard, of sets of shingles
TICK_DOCUMENTS = 1000  # between two signs of life


def threshold(spec: str) -> float | None:
    """Similarity from which texts are copies of each other, 1: equal ones; None: copies stay.
    UsageError for a spec that is not none, exact or near[:SIMILARITY]."""
    kind, _, number = spec.partition(":")
    try:
        value = {"none": None, "exact": 1.0, "near": float(number or SIMILARITY)}[kind]
    except (KeyError, ValueError):
        value = -1.0
    if (value is not None and not 0 < value <= 1) or (number and kind != "near"):
        raise UsageError(
            f"--dedup={spec}: expected none, exact, near or near:SIMILARITY with a similarity between 0 "
            f"and 1, such as near:{SIMILARITY}"
        )
    return value


def scan_files(unit: Unit) -> dict[str, str]:
    """What `scan` writes of the documents that the filters leave: their number in the unit,
    hash, and MinHash."""
    return {what: f"{WORK}/scan-{unit.name}.{what}" for what in ("numbers", "hashes", "minhash")}


def scan(
    job: PrepareJob, unit: Unit, tick: Callable[[int, int], None], *, wants_characters: bool
) -> dict:
    """Reads a unit and writes `scan_files`; its marker also has `documents` (with text, dropped
    ones too) and the `characters` that occur, if they are wanted."""
    numbers, hashes, signatures, characters, counts = [], [], [], set(), units.Counts()
    near = job.settings.dedup.startswith("near")
    documents = size = 0
    for text in units.read(job, unit, counts):
        numbers.append(text.number)
        hashes.append(text.hash)
        if near:
            signatures.append(duplicates.minhash(text.text))
        if wants_characters:
            characters.update(text.text)
        documents, size = documents + 1, size + len(text.text.encode())
        if documents == TICK_DOCUMENTS:
            tick(documents, size)
            documents = size = 0
    tick(documents, size)
    found = {"numbers": np.array(numbers, np.uint32), "hashes": np.array(hashes, np.uint64)}
    if near:
        found["minhash"] = np.array(signatures)
    files = {
        name: replace_file(job.folder / name, found[what].tobytes())
        for what, name in scan_files(unit).items()
        if what in found
    }
    return units.finish(
        job,
        "scan",
        unit,
        files,
        counts,
        documents=counts.tally.documents,
        characters="".join(sorted(characters)),
    )


def decide(
    job: PrepareJob, todo: Sequence[Unit], scans: Sequence[dict]
) -> tuple[list[str], int, int]:
    """Writes `units.keep_file` of every unit; (SHA-256 of each, exact copies, near copies)."""
    names = [scan_files(unit) for unit in todo]
    parts = [np.fromfile(job.folder / name["hashes"], np.uint64) for name in names]
    hashes = np.concatenate(parts)
    stays = np.zeros(len(hashes), bool)
    stays[np.unique(hashes, return_index=True)[1]] = True  # the first of each
    exact, near = int(len(stays) - stays.sum()), 0
    if job.settings.dedup.startswith("near"):
        like = duplicates.minhash("")
        signatures = np.concatenate(
            [np.fromfile(job.folder / name["minhash"], like.dtype) for name in names]
        )
        unique = np.flatnonzero(stays)
        again = duplicates.near_duplicates(
            signatures.reshape(-1, len(like))[unique], threshold(job.settings.dedup)
        )
        stays[unique[again]] = False
        near = int(again.sum())
    keys, start = [], 0
    for unit, scan, name, part in zip(todo, scans, names, parts):
        keep = np.zeros(scan["documents"], bool)
        keep[np.fromfile(job.folder / name["numbers"], np.uint32)] = stays[
            start : start + len(part)
        ]
        keys.append(replace_file(job.folder / units.keep_file(unit), keep.tobytes()).sha256)
        start += len(part)
    return keys, exact, near
