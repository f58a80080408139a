"""What the units made, put together: the index of each source and the manifest (called by prepare).

Shards lie where the workers wrote them; only their indexes are joined, a unit at a time, so memory
does not grow with the corpus. Nothing here is lost by a kill: it is all made again from the units
until the manifest is there.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpt_jax.data.prepare import units
from gpt_jax.data.prepare.units import WORK, PrepareJob, Unit
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus, shards
from gpt_jax.data.tokens.shards import DOCUMENT, SIDES, Origin
from gpt_jax.files import Digest, replace_file, replacing, sync_file

INPUTS = "inputs.json"


def _join(path: Path, chunks: Iterable[bytes]) -> Digest:
    sha256, size = hashlib.sha256(), 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            sha256.update(chunk)
            size += len(chunk)
        sync_file(file)
    return Digest(size, sha256.hexdigest())


def assemble(
    job: PrepareJob,
    todo: Sequence[Unit],
    made: Sequence[dict],
    counted: Sequence[dict],
    tokenizer: Tokenizer,
    about: dict,
    dropped: Sequence[int],
) -> dict:
    """Writes the indexes and gives the manifest; `counted`: the results of the phase that read
    everything, `dropped`: exact and near copies."""
    content, sources = hashlib.sha256(), {}
    files = {
        "tokenizer.json": replace_file(job.folder / "tokenizer.json", tokenizer.to_json().encode())
    }
    for name in dict.fromkeys(unit.source for unit in todo):
        mine = [i for i, unit in enumerate(todo) if unit.source == name]
        sources[name] = _source(
            job, name, [todo[i] for i in mine], [made[i] for i in mine], files, content
        )
        origins = _origins([todo[i] for i in mine], [counted[i] for i in mine])
        files[f"{name}/origins.json"] = replace_file(
            job.folder / name / "origins.json", json.dumps(origins).encode()
        )
    return {
        "format": corpus.FORMAT,
        "content": content.hexdigest()[:20],
        "settings": about,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab": tokenizer.vocab,
        },
        "dtype": shards.id_type(tokenizer.vocab).name,
        "sources": sources,
        "counts": _counts(job, counted, dropped),
        "files": dict(sorted(files.items())),
    }


def _source(
    job: PrepareJob, name: str, mine: Sequence[Unit], made: Sequence[dict], files: dict, content
) -> dict:
    """Counts and shards of each side; adds to `files` and `content`."""
    found = {}
    for side in SIDES:
        parts = [result["sides"][side] for result in made]
        whole = [
            (unit, part, result)
            for unit, part, result in zip(mine, parts, made)
            if part["documents"]
        ]
        for unit, _, result in whole:
            shard = units.unit_file(unit, side, ".tokens")
            files[shard] = Digest(*result["files"][shard])
        content.update(json.dumps([side, sum(part["documents"] for part in parts)]).encode())
        index = {
            ".offsets": _offsets(job, side, whole),
            ".docs": _docs(job, side, mine, made, content),
        }
        for suffix, chunks in index.items():
            files[f"{name}/{side}{suffix}"] = _join(job.folder / name / f"{side}{suffix}", chunks)
        counts = (
            "documents",
            "tokens",
            "bytes",
            "lost",
        )  # the last is new: a unit of an older version has none
        found[side] = {key: sum(part.get(key, 0) for part in parts) for key in counts} | {
            "shards": [
                [Path(units.unit_file(unit, side, ".tokens")).name, part["tokens"]]
                for unit, part, _ in whole
            ]
        }
    return found


def _offsets(job: PrepareJob, side: str, whole) -> Iterable[bytes]:
    """int64: 0, then where each document ends."""
    start = 0
    yield np.zeros(1, np.int64).tobytes()
    for unit, part, _ in whole:
        ends = np.fromfile(job.folder / units.unit_file(unit, side, ".offsets"), np.int64)[1:]
        yield (ends + start).tobytes()
        start += part["tokens"]


def _docs(
    job: PrepareJob, side: str, mine: Sequence[Unit], made: Sequence[dict], content
) -> Iterable[bytes]:
    """DOCUMENT of each, its piece counted through the source; the hashes go into `content`."""
    start = 0
    for unit, result in zip(mine, made):
        if result["sides"][side]["documents"]:
            docs = np.fromfile(job.folder / units.unit_file(unit, side, ".docs"), DOCUMENT)
            docs["piece"] += start
            content.update(docs["hash"].tobytes())
            yield docs.tobytes()
        start += len(unit.pieces)


def _origins(mine: Sequence[Unit], counted: Sequence[dict]) -> list[Origin]:
    """Of every piece of a source. The rows of a file are counted through its pieces."""
    found, rows = [], Counter()
    for unit, result in zip(mine, counted):
        for piece, count, several in zip(unit.pieces, result["rows"], result["several"]):
            found.append(Origin(piece.source.name, rows[piece.source.path], several))
            rows[piece.source.path] += count
    return found


def _counts(job: PrepareJob, counted: Sequence[dict], dropped: Sequence[int]) -> dict:
    tally, filtered = Tally(), Counter()
    for result in counted:
        tally += Tally(**result["tally"])
        filtered.update(result["filtered"])
    return {
        "documents": tally.documents,
        "empty": tally.empty,
        "skipped": tally.skipped,
        "places": tally.places,
        "replaced": tally.replaced,
        "encodings": tally.encodings,
        "filtered": dict(filtered),
        "dedup": job.settings.dedup,
        "exact": dropped[0],
        "near": dropped[1],
    }


OURS = re.compile(
    r"(train|eval)-\d{5,}\.tokens|\.(train|eval)-\d{5,}-[0-9a-f]{32}\.\w+|\.[0-9a-f]{32}"
)


def leftovers(folder: Path, manifest: dict) -> list[Path]:
    """The work, what kills left, and shards of earlier calls that are no part of the corpus."""
    there = [
        *folder.iterdir(),
        *(path for name in manifest["sources"] for path in (folder / name).iterdir()),
    ]
    ours = [path for path in there if OURS.fullmatch(path.name)]
    return [
        path for path in ours if path.relative_to(folder).as_posix() not in manifest["files"]
    ] + [path for path in (folder / WORK,) if path.is_dir()]


def clean(folder: Path, manifest: dict) -> None:
    """Removes `leftovers`; the caller has the lock of the folder."""
    for path in leftovers(folder, manifest):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
