"""What the units made, put together: the index of each source, and the manifest.

Shards stay where the workers wrote them. Only their indexes are joined, a unit at a time, so memory
does not grow with the corpus. A kill loses nothing here, because all of it is made again from the
units until the manifest is written.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.prepare import units
from gpt_jax.data.prepare.units import WORK, PrepareJob, Unit
from gpt_jax.data.read.documents import Tally
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus, shards
from gpt_jax.data.tokens.shards import DOCUMENT, SIDES, Origin
from gpt_jax.files import Digest, replace_file, replacing, sync_file


class Done(NamedTuple):
    """A unit with its markers."""

    unit: Unit
    tokens: dict  # the marker of the phase that wrote its tokens
    read: dict  # the marker of the phase that read all of it, which may be the same


class Assembly:
    """The manifest of a corpus in the making."""

    def __init__(self, job: PrepareJob):
        self.job = job
        self.files: dict[str, Digest] = {}
        self.content = hashlib.sha256()  # of the texts, by their hashes, side by side

    def write(self, name: str, raw: bytes) -> None:
        """Writes a file and notes its digest."""
        self.files[name] = replace_file(self.job.folder / name, raw)

    def join(self, name: str, chunks: Iterator[bytes]) -> None:
        """Writes a file of chunks, one at a time in memory, and notes its digest."""
        sha256 = hashlib.sha256()
        size = 0
        with replacing(self.job.folder / name) as temporary, open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                sha256.update(chunk)
                size += len(chunk)
            sync_file(file)
        self.files[name] = Digest(size, sha256.hexdigest())


def assemble(
    job: PrepareJob,
    todo: Sequence[Unit],
    made: Sequence[dict],
    counted: Sequence[dict],
    tokenizer: Tokenizer,
    about: dict,
    dropped: Sequence[int],
) -> dict:
    """Writes the indexes, and gives the manifest.

    `made` are the markers of the units' tokens, `counted` those of the phase that read everything.
    `dropped` are the numbers of exact and of near copies.
    """
    assembly = Assembly(job)
    assembly.write("tokenizer.json", tokenizer.to_json().encode())

    done = [Done(*row) for row in zip(todo, made, counted, strict=True)]
    sources = {}
    for name in dict.fromkeys(unit.source for unit in todo):
        mine = [one for one in done if one.unit.source == name]
        sources[name] = {side: _add_side(assembly, name, side, mine) for side in SIDES}
        assembly.write(f"{name}/origins.json", json.dumps(_list_origins(mine)).encode())

    return {
        "format": corpus.choose_format(sources),
        "content": assembly.content.hexdigest()[:20],
        "settings": about,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab": tokenizer.vocab,
        },
        "dtype": shards.choose_id_type(tokenizer.vocab).name,
        "sources": sources,
        "counts": _sum_counts(job, counted, dropped),
        "files": dict(sorted(assembly.files.items())),
    }


# ---- a side of a source ----


def _add_side(assembly: Assembly, name: str, side: str, mine: Sequence[Done]) -> dict:
    """Writes the index of a side of a source, and gives its counts and its shards."""
    written = [one for one in mine if one.tokens["sides"][side]["documents"]]
    names = []
    for one in written:
        shard = units.unit_file(one.unit, side, ".tokens")
        assembly.files[shard] = Digest(*one.tokens["files"][shard])
        learn = units.unit_file(one.unit, side, ".learn")
        if learn in one.tokens["files"]:
            assembly.files[learn] = Digest(*one.tokens["files"][learn])
        names.append([Path(shard).name, one.tokens["sides"][side]["tokens"]])

    parts = [one.tokens["sides"][side] for one in mine]
    documents = sum(part["documents"] for part in parts)
    assembly.content.update(json.dumps([side, documents]).encode())
    assembly.join(f"{name}/{side}.offsets", _join_offsets(assembly.job, side, written))
    assembly.join(f"{name}/{side}.docs", _join_docs(assembly, side, mine))

    # A unit of an older version has not counted what is lost.
    counts = {
        key: sum(part.get(key, 0) for part in parts)
        for key in ("documents", "tokens", "bytes", "lost")
    }
    unlearned = sum(part.get("unlearned", 0) for part in parts)
    if unlearned:
        counts["learned"] = counts["tokens"] - unlearned
        _add_learn_bits(assembly, side, written)
    return counts | {"shards": names}


def _add_learn_bits(assembly: Assembly, side: str, written: Sequence[Done]) -> None:
    """Makes what is learned a part of the content, however the input is cut into units."""
    for one in written:
        name = units.unit_file(one.unit, side, ".learn")
        if name in one.tokens["files"]:
            assembly.content.update((assembly.job.folder / name).read_bytes())
        else:
            assembly.content.update(b"\1" * one.tokens["sides"][side]["tokens"])


def _join_offsets(job: PrepareJob, side: str, written: Sequence[Done]) -> Iterator[bytes]:
    """int64: 0, then where each document ends."""
    start = 0
    yield np.zeros(1, np.int64).tobytes()
    for one in written:
        path = job.folder / units.unit_file(one.unit, side, ".offsets")
        ends = np.fromfile(path, np.int64)[1:]
        yield (ends + start).tobytes()
        start += one.tokens["sides"][side]["tokens"]


def _join_docs(assembly: Assembly, side: str, mine: Sequence[Done]) -> Iterator[bytes]:
    """DOCUMENT of each document, its piece counted through the source.

    The hashes of the texts become part of the content.
    """
    start = 0
    for one in mine:
        if one.tokens["sides"][side]["documents"]:
            path = assembly.job.folder / units.unit_file(one.unit, side, ".docs")
            docs = np.fromfile(path, DOCUMENT)
            docs["piece"] += start
            assembly.content.update(docs["hash"].tobytes())
            yield docs.tobytes()
        start += len(one.unit.pieces)


def _list_origins(mine: Sequence[Done]) -> list[Origin]:
    """The Origin of every piece of a source. Rows of a file are counted through its pieces."""
    origins = []
    rows = Counter()
    for one in mine:
        pieces = zip(one.unit.pieces, one.read["rows"], one.read["several"], strict=True)
        for piece, count, several in pieces:
            path = piece.source.path
            origins.append(Origin(piece.source.name, rows[path], several))
            rows[path] += count
    return origins


def _sum_counts(job: PrepareJob, counted: Sequence[dict], dropped: Sequence[int]) -> dict:
    """What became of all documents."""
    tally = Tally()
    filtered = Counter()
    for marker in counted:
        tally += Tally(**marker["tally"])
        filtered.update(marker["filtered"])
    exact, near = dropped
    return {
        "documents": tally.documents,
        "empty": tally.empty,
        "skipped": tally.skipped,
        "places": tally.places,
        "replaced": tally.replaced,
        "encodings": tally.encodings,
        "filtered": dict(filtered),
        "dedup": job.settings.dedup,
        "exact": exact,
        "near": near,
    }


# ---- cleaning up ----

# Names of shards, of shards in the making, and of other files in the making (see files.replacing).
OURS = re.compile(
    r"(train|eval)-\d{5,}\.(tokens|learn)|\.(train|eval)-\d{5,}-[0-9a-f]{32}\.\w+|\.[0-9a-f]{32}"
)


def find_leftovers(folder: Path, manifest: dict) -> list[Path]:
    """The work, what kills left, and shards of earlier calls that are no part of the corpus."""
    paths = list(folder.iterdir())
    for name in manifest["sources"]:
        paths += (folder / name).iterdir()
    leftovers = [
        path
        for path in paths
        if OURS.fullmatch(path.name)
        and path.relative_to(folder).as_posix() not in manifest["files"]
    ]
    work = folder / WORK
    return [*leftovers, work] if work.is_dir() else leftovers


def clean(folder: Path, manifest: dict) -> None:
    """Removes what `find_leftovers` lists. The caller holds the lock of the folder."""
    for path in find_leftovers(folder, manifest):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
