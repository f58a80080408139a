"""A unit of `gpt-jax prepare`: some input that is read, filtered, split and tokenized by itself.

What a unit makes depends on its input and the settings alone. Its files are written under other
names and renamed, and its marker (json) is written last. So a kill at any moment leaves a unit done
or not done, and two processes that do the same unit harm nothing.
"""

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.prepare import filters
from gpt_jax.data.prepare.encoding import Part, Text, encode, load_tokenizer, split_into_parts
from gpt_jax.data.read import documents as readers
from gpt_jax.data.read.decoding import Piece, Reading
from gpt_jax.data.read.documents import Document, Tally
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.marks import find_end_name, list_end_names
from gpt_jax.data.tokens.shards import SIDES
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import Digest, replace_file
from gpt_jax.schema import Each, read_json

WORK = "work"  # the folder of what is unfinished

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the content of the output, together with the input."""

    tokenizer: str = "bytes"  # a spec, see tokenizers/spec.py
    begin: bool = False  # whether documents begin with the token that its model expects there
    reading: Reading = field(default_factory=Reading)
    filters: tuple[str, ...] = ()  # specs of filters, applied in order, see filters.FILTERS
    dedup: str = "none"  # none | exact | near[:SIMILARITY]
    eval_fraction: float = 0.0  # held out by hash of the text
    piece_mb: float = 0.0  # input of a unit; 0: it follows from the size of the input
    tokenizer_mb: float = 200.0  # text that a trained tokenizer sees


class Unit(NamedTuple):
    """Some pieces of one source."""

    source: str
    number: int  # among the units of its source
    pieces: tuple[Piece, ...]
    size: int  # bytes of input
    key: str  # digest of everything that decides what it makes

    @property
    def name(self) -> str:
        """A name that no other unit of the job has."""
        return f"{self.source}-{self.number:05d}"

    def describe(self) -> str:
        """Its files, for messages."""
        names = list(dict.fromkeys(str(piece.source.path) for piece in self.pieces))
        start = self.pieces[0].start
        begin = f" from {start:,} on" if start else ""
        more = f" and {len(names) - 1} more files" if names[1:] else ""
        return f"{names[0]}{begin}{more}"


class PrepareJob(NamedTuple):
    """What is the same for all units."""

    folder: Path  # the output
    settings: PrepareSettings


# ---- reading ----


@dataclass
class Counts:
    """What became of the documents of a unit."""

    tally: Tally = field(default_factory=Tally)
    rows: list[int] = field(default_factory=list)  # of each piece
    # Whether the file of each piece holds more than one document.
    several: list[bool] = field(default_factory=list)
    filtered: Counter = field(default_factory=Counter)  # documents dropped, by filter
    # Documents that hold a name of end of text, by name.
    marks: Counter = field(default_factory=Counter)


def read(
    job: PrepareJob, unit: Unit, counts: Counts, keep: np.ndarray | None = None
) -> Iterator[Text]:
    """The texts of a unit that the filters leave, in order. Fills `counts`.

    With `keep` (bool [documents]) only the documents that it names are read. Raises DataError if
    the unit does not have that many.
    """
    chain = filters.parse_filters(job.settings.filters)
    number = -1
    for index, piece in enumerate(unit.pieces):
        tally = Tally()
        counts.several.append(piece.start > 0)
        for document in readers.read_documents((piece,), job.settings.reading, tally):
            number += 1
            counts.several[index] |= document.name != piece.source.name
            if keep is not None and not (number < len(keep) and keep[number]):
                continue
            text, dropped_by = _filter(chain, document)
            if text is None:
                counts.filtered[dropped_by] += 1
            else:
                yield Text(index, document, text, _hash(document, text), number)
        counts.tally += tally
        counts.rows.append(tally.rows)

    if keep is not None and number + 1 != len(keep):
        raise DataError(f"{unit.describe()}: changed while being read; run the command again")


def _filter(chain: filters.Chain, document: Document) -> tuple[str | None, str]:
    """(the text that the filters leave or None, the filter that dropped it).

    Raises UsageError if a filter changes a text of spans, because nobody could say then what is
    learned of it.
    """
    try:
        text, dropped_by = chain(document.text)
    except UsageError as error:
        raise UsageError(f"{document.name}: {error}") from None
    if document.spans and text is not None and text != document.text:
        raise UsageError(
            f"{document.name}: one of --filters changes its text, and with --task a filter can "
            "only keep or drop a row; change the rows before"
        )
    return text, dropped_by


def _hash(document: Document, text: str) -> int:
    try:
        return shards.hash_text(text)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{document.name}: a filter left a lone surrogate at character {error.start}, which no "
            "UTF-8 text contains"
        ) from None


# ---- markers: what is done ----


def locate_marker(job: PrepareJob, phase: str, unit: Unit) -> Path:
    """Where the marker of a phase of a unit lies."""
    return job.folder / WORK / f"{phase}-{unit.name}.json"


# What every phase writes. A phase may add more.
MARKER_SCHEMA = {
    "key": "text",
    "files": Each(("count", "text")),
    "rows": ["count"],
    "several": ["flag"],
    "tally": "object",
    "filtered": Each("count"),
}


def read_marker(job: PrepareJob, phase: str, unit: Unit) -> dict | None:
    """What a phase has made of a unit; None if it is not done or a file is missing."""
    try:
        marker = read_json(locate_marker(job, phase, unit).read_bytes(), MARKER_SCHEMA)
        marker["tally"].pop("bytes", None)  # an older version wrote it
        if marker["key"] != unit.key:
            return None
        for name, (size, _) in marker["files"].items():
            if os.path.getsize(job.folder / name) != size:
                return None
        return marker
    except (OSError, ValueError):  # a file is missing, or the marker is torn
        return None


def write_marker(
    job: PrepareJob, phase: str, unit: Unit, files: dict[str, Digest], counts: Counts, **more
) -> dict:
    """Writes and gives the marker of a phase. `more` is json."""
    marker = {
        "key": unit.key,
        "files": files,
        "rows": counts.rows,
        "several": counts.several,
        "tally": asdict(counts.tally),
        "filtered": counts.filtered,
    } | more
    raw = json.dumps(marker)
    replace_file(locate_marker(job, phase, unit), raw.encode())
    return json.loads(raw)  # as `read_marker` gives it


# ---- tokenizing ----


def keep_file(unit: Unit) -> str:
    """The file with one byte a document of the unit: whether it stays.

    It is written when duplicates are looked for.
    """
    return f"{WORK}/keep-{unit.name}"


def unit_file(unit: Unit, side: str, suffix: str) -> str:
    """The file of a unit's shard, or of its part of the index."""
    if suffix in (".tokens", ".learn"):
        return f"{unit.source}/{side}-{unit.number:05d}{suffix}"
    return f"{WORK}/tokens-{unit.name}-{side}{suffix}"


def is_held_out(text_hash: int, fraction: float) -> bool:
    """Whether a document is held out, by its hash alone.

    So copies stay together, and added files move no document across.
    """
    return text_hash < int(fraction * 2.0**64)


def tokenize(
    job: PrepareJob, unit: Unit, tick: Tick, *, fingerprint: str, keep: bool, begin: int | None
) -> dict:
    """Writes at most one shard for each side, and its index among the work. Gives the marker.

    Each document begins with the id `begin`, if it is given.

    The marker also has `sides`: {side: documents, tokens, bytes, lost}, and `marks`. Memory: the
    largest document, and 32 bytes for each.
    """
    tokenizer = load_tokenizer(job.folder / WORK / "tokenizer.json", fingerprint)
    kept = np.fromfile(job.folder / keep_file(unit), bool) if keep else None
    dtype = shards.choose_id_type(tokenizer.vocab)
    counts = Counts()

    folder = job.folder / unit.source
    temporary = {side: folder / f".{side}-{unit.number:05d}-{uuid.uuid4().hex}" for side in SIDES}
    writers = {side: shards.Writer(temporary[side], dtype, tokenizer.eot, begin) for side in SIDES}
    try:
        texts = _watch(read(job, unit, counts, kept), tokenizer, counts)
        parts = split_into_parts(texts, tokenizer)
        for batch, ids in encode(parts, tokenizer):
            tick(*_write(writers, tokenizer, batch, ids, job.settings.eval_fraction))
        files = {}
        for side, out in writers.items():
            files |= _finish_side(job, unit, side, out, temporary[side])
    finally:
        for side, out in writers.items():
            out.close_files()
            for suffix in shards.SUFFIXES:
                Path(f"{temporary[side]}{suffix}").unlink(missing_ok=True)

    sides = {side: out.counts() for side, out in writers.items()}
    return write_marker(job, "tokens", unit, files, counts, sides=sides, marks=counts.marks)


def _watch(texts: Iterable[Text], tokenizer: Tokenizer, counts: Counts) -> Iterator[Text]:
    """The same texts. Counts those that hold a name of end of text."""
    names = list_end_names(tokenizer)
    for text in texts:
        name = find_end_name(text.text, names)
        if name:
            counts.marks[name] += 1
        yield text


def _write(
    writers: dict[str, shards.Writer],
    tokenizer: Tokenizer,
    batch: list[Part],
    ids: list[np.ndarray],
    fraction: float,
) -> tuple[int, int]:
    """Writes a batch to its sides. Gives the documents that ended in it, and their bytes."""
    documents = 0
    size = 0
    for (text, part, learn, _, last), part_ids in zip(batch, ids, strict=True):
        out = writers["eval" if is_held_out(text.hash, fraction) else "train"]
        out.write(part_ids, tokenizer.lost(part, part_ids), learn)
        if last:
            length = len(text.text.encode())
            out.end(text.hash, length, text.document.row, text.piece)
            documents += 1
            size += length
    return documents, size


def _finish_side(
    job: PrepareJob, unit: Unit, side: str, out: shards.Writer, temporary: Path
) -> dict[str, Digest]:
    """Closes a writer and renames its files; a side without tokens leaves none."""
    digests = out.close()
    if not out.tokens:
        return {}
    files = {}
    for suffix, digest in digests.items():
        name = unit_file(unit, side, suffix)
        os.replace(f"{temporary}{suffix}", job.folder / name)
        files[name] = digest
    return files
