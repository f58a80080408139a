"""A unit of `gpt-jax prepare`: some input that is read, filtered, split and tokenized by itself
(called by prepare, survey, and by worker processes on any machine).

What a unit makes depends on its input and the settings alone. Its files are written under other
names and renamed, its marker (json) is written last: a kill at any moment leaves a unit done or not
done, and two processes that do the same unit harm nothing.
"""

import functools
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.prepare import filters
from gpt_jax.data.read import documents as readers
from gpt_jax.data.read.decoding import Piece, Reading
from gpt_jax.data.read.documents import Document, Tally
from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.shards import SIDES
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import Digest, replace_file

WORK = "work"  # the folder of what is unfinished
BATCH_CHARACTERS = (
    1 << 20
)  # encoded at once; the library holds some 40 bytes a character of it while it does


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the content of the output, besides the input."""

    tokenizer: str = "bytes"  # a spec, see tokenizer
    reading: Reading = field(default_factory=Reading)
    filters: tuple[str, ...] = ()  # see filters.FILTERS, applied in order
    dedup: str = "none"  # none | exact | near[:SIMILARITY]
    eval_fraction: float = 0.0  # held out by hash of the text
    piece_mb: float = 0.0  # input of a unit; 0: from the size of the input
    tokenizer_mb: float = 200.0  # of text that a trained tokenizer sees


class Unit(NamedTuple):
    """Some pieces of one source."""

    source: str
    number: int  # among the units of its source
    pieces: tuple[Piece, ...]
    size: int  # bytes of input
    key: str  # digest of everything that decides what it makes

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:05d}"

    def describe(self) -> str:
        """Its files, for messages."""
        names = list(dict.fromkeys(str(piece.source.path) for piece in self.pieces))
        more = f" and {len(names) - 1} more files" if names[1:] else ""
        piece = self.pieces[0]
        return names[0] + (f" from {piece.start:,} on" if piece.start else "") + more


class PrepareJob(NamedTuple):
    """What is the same for all units."""

    folder: Path  # the output
    settings: PrepareSettings


class Text(NamedTuple):
    """A document after the filters."""

    piece: int
    document: Document
    text: str
    hash: int
    number: int  # of the document among all those of the unit that have text


@dataclass
class Counts:
    """What became of the documents of a unit."""

    tally: Tally = field(default_factory=Tally)
    rows: list[int] = field(default_factory=list)  # of each piece
    several: list[bool] = field(
        default_factory=list
    )  # whether the piece's file holds more than one document
    filtered: Counter = field(default_factory=Counter)  # documents dropped, by filter


def read(
    job: PrepareJob, unit: Unit, counts: Counts, keep: np.ndarray | None = None
) -> Iterator[Text]:
    """The texts of a unit that the filters leave, in order; with `keep` (bool [documents])
    those. Fills `counts`."""
    apply, number = filters.parse(job.settings.filters), -1
    for index, piece in enumerate(unit.pieces):
        tally = Tally()
        counts.several.append(piece.start > 0)
        for document in readers.documents((piece,), job.settings.reading, tally):
            number += 1
            counts.several[index] |= document.name != piece.source.name
            if keep is not None and not (number < len(keep) and keep[number]):
                continue
            try:
                text, dropped_by = apply(document.text)
                hashed = shards.text_hash(text or "")
            except UsageError as error:
                raise UsageError(f"{document.name}: {error}") from None
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{document.name}: a filter left a lone surrogate at character {error.start}, which "
                    "no UTF-8 text contains"
                ) from None
            if text is None:
                counts.filtered[dropped_by] += 1
            else:
                yield Text(index, document, text, hashed, number)
        counts.tally += tally
        counts.rows.append(tally.rows)
    if keep is not None and number + 1 != len(keep):
        raise DataError(f"{unit.describe()}: changed while being read; run the command again")


# ---- markers: what is done ----


def marker(job: PrepareJob, phase: str, unit: Unit) -> Path:
    return job.folder / WORK / f"{phase}-{unit.name}.json"


def finished(job: PrepareJob, phase: str, unit: Unit) -> dict | None:
    """What a phase has made of a unit, if it is done and all its files are there."""
    try:
        found = json.loads(marker(job, phase, unit).read_bytes())
        found["tally"].pop("bytes", None)  # of an older version
        whole = found["key"] == unit.key and all(
            os.path.getsize(job.folder / name) == size for name, (size, _) in found["files"].items()
        )
        return found if whole else None
    except (OSError, ValueError, KeyError):  # not there, or torn: it is made again
        return None


def finish(
    job: PrepareJob, phase: str, unit: Unit, files: dict[str, Digest], counts: Counts, **more
) -> dict:
    """Writes the marker. `more` is json."""
    made = {
        "key": unit.key,
        "files": files,
        "rows": counts.rows,
        "several": counts.several,
        "tally": asdict(counts.tally),
        "filtered": counts.filtered,
    } | more
    replace_file(marker(job, phase, unit), json.dumps(made).encode())
    return json.loads(json.dumps(made))  # as `finished` gives it


# ---- tokenize ----


@functools.lru_cache(1)
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """Once a process: a large vocabulary takes a second."""
    tokenizer = tokenizer_from_json(path.read_text(encoding="utf-8"))
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path}: is not the tokenizer of this job; run the command again")
    return tokenizer


class Part(NamedTuple):
    """A part of a text that is encoded by itself."""

    of: Text
    text: str
    last: bool


def _parts(texts: Iterable[Text], tokenizer: Tokenizer) -> Iterator[Part]:
    for text in texts:
        parts = tokenizer.parts(text.text)
        part = next(parts)
        for following in parts:
            yield Part(text, part, False)
            part = following
        yield Part(text, part, True)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[Part]) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch([part.text for part in batch])
    except UsageError:
        for part in batch:  # whose it is
            try:
                tokenizer.encode(part.text)
            except UsageError as error:
                raise UsageError(f"{part.of.document.name}: {error}") from None
        raise


def _encoded(
    parts: Iterable[Part], tokenizer: Tokenizer
) -> Iterator[tuple[list[Part], list[np.ndarray]]]:
    """Batches with their ids; one is encoded while the one before is written and the one after
    is read."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in _batches(parts):
            following = batch, thread.submit(_encode, tokenizer, batch)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def keep_file(unit: Unit) -> str:
    """One byte a document of the unit: whether it stays. Written by prepare when duplicates are
    looked for."""
    return f"{WORK}/keep-{unit.name}"


def is_held_out(text_hash: int, fraction: float) -> bool:
    """A decision on each document alone, so that copies stay together and added files move none
    across."""
    return text_hash < int(fraction * 2.0**64)


def tokenize(
    job: PrepareJob, unit: Unit, tick: Callable[[int, int], None], *, fingerprint: str, keep: bool
) -> dict:
    """Writes at most one shard for each side: `SOURCE/SIDE-NUMBER.tokens`, and its index among
    the work; the marker also has `sides`: {side: documents, tokens, bytes, lost}. Memory: the
    largest document and 32 bytes for each."""
    tokenizer = _tokenizer(job.folder / WORK / "tokenizer.json", fingerprint)
    kept = np.fromfile(job.folder / keep_file(unit), bool) if keep else None
    folder, dtype, counts = job.folder / unit.source, shards.id_type(tokenizer.vocab), Counts()
    temporary = {side: folder / f".{side}-{unit.number:05d}-{uuid.uuid4().hex}" for side in SIDES}
    writers = {side: shards.Writer(temporary[side], dtype, tokenizer.eot) for side in SIDES}
    fraction = job.settings.eval_fraction
    try:
        for batch, encoded in _encoded(_parts(read(job, unit, counts, kept), tokenizer), tokenizer):
            documents = size = 0
            for (text, part, last), ids in zip(batch, encoded):
                out = writers["eval" if is_held_out(text.hash, fraction) else "train"]
                out.write(ids, tokenizer.lost(part, ids))
                if last:
                    length = len(text.text.encode())
                    out.end(text.hash, length, text.document.row, text.piece)
                    documents, size = documents + 1, size + length
            tick(documents, size)
        files, sides = {}, {}
        for side, out in writers.items():
            digests = out.close()
            sides[side] = {
                "documents": len(out.offsets) - 1,
                "tokens": out.tokens,
                "bytes": out.bytes,
                "lost": out.lost,
            }
            for suffix, digest in digests.items() if out.tokens else ():
                name = unit_file(unit, side, suffix)
                os.replace(f"{temporary[side]}{suffix}", job.folder / name)
                files[name] = digest
    finally:
        for side, out in writers.items():
            out.file.close()
            for suffix in shards.SUFFIXES:
                Path(f"{temporary[side]}{suffix}").unlink(missing_ok=True)
    return finish(job, "tokens", unit, files, counts, sides=sides)


def unit_file(unit: Unit, side: str, suffix: str) -> str:
    """Where a unit's shard or its part of the index goes."""
    if suffix == ".tokens":
        return f"{unit.source}/{side}-{unit.number:05d}.tokens"
    return f"{WORK}/tokens-{unit.name}-{side}{suffix}"
