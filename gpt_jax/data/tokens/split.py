"""Which text is held out (called by cache).

`plan` reads the sources once and decides; `Corpus.texts` reads them again and says of each text on
which side it falls. Two readings instead of one keep memory at one document, whatever the size of
the corpus.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt_jax import config
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Document, Tally, documents, whole
from gpt_jax.data.read.sources import Source
from gpt_jax.data.tokens.shards import text_hash
from gpt_jax.errors import DataError, UsageError

TRAIN, EVAL = "train", "eval"


@dataclass(frozen=True, eq=False)
class SplitCorpus:
    """Sources with a decision for every document."""

    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...]
    data: config.Data
    held_out: np.ndarray  # bool [documents of sources]
    cut: int  # the character at which the only document is cut in two; 0: none is
    characters: str  # all that occur, sorted; empty unless they were asked for
    notes: tuple[str, ...]  # what the reading has to tell, a line each

    def texts(self) -> Iterator[tuple[str, int, Document]]:
        """(side, number of the source, document) in the order read, `eval_sources` numbered
        after `sources`; DataError if the sources changed since `plan`."""
        count = 0
        for count, (source, document) in enumerate(_read(self.sources, self.data), 1):
            if count > len(self.held_out):
                break
            if self.cut:
                yield TRAIN, source, document._replace(text=document.text[: self.cut])
                yield EVAL, source, document._replace(text=document.text[self.cut :])
            else:
                yield (EVAL if self.held_out[count - 1] else TRAIN), source, document
        if count != len(self.held_out):
            raise DataError(f"{', '.join(self.data.path)}: changed while being read; start again")
        for source, document in _read(self.eval_sources, self.data):
            yield EVAL, len(self.sources) + source, document

    def side(self, side: str) -> Iterator[str]:
        return (document.text for where, _, document in self.texts() if where == side)


def reading_of(data: config.Data) -> Reading:
    """How a run reads its text."""
    try:
        return Reading(data.field, data.errors, data.encodings, documents=data.documents)
    except UsageError as error:
        raise UsageError(f"config.data.{error}") from None


def _read(sources, data: config.Data, tally: Tally | None = None) -> Iterator[tuple[int, Document]]:
    """(number of the source, document) in order."""
    for number, source in enumerate(sources):
        for document in documents((whole(source),), reading_of(data), tally):
            yield number, document


def _tail(sizes: np.ndarray, hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, int]:
    """The last part by position. One document is cut as nanoGPT cuts its file; of many, those
    that begin after the cut are held out, and at least the last."""
    cut = int(sizes.sum() * (1 - fraction))
    if len(sizes) == 1:
        if not 0 < cut < sizes[0]:
            raise UsageError(
                f"config.data.eval_fraction = {fraction}: leaves no text on one side of a document of "
                f"{sizes[0]} characters; give more text or config.data.eval_path"
            )
        return np.zeros(1, bool), cut
    held_out = np.cumsum(sizes) - sizes >= cut
    held_out[0], held_out[-1] = False, True
    return held_out, 0


def _by_document(sizes: np.ndarray, hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, int]:
    """By a hash of the text alone: adding documents moves none across, and copies of one text
    stay together."""
    if len(set(hashes.tolist())) < 2:
        raise UsageError(
            "config.data.split = 'document': needs at least two different documents and there is one; use "
            "--config.data.split=tail or give config.data.eval_path"
        )
    order = np.unique(hashes)
    limit = min(
        max(int(fraction * 2.0**64), int(order[0])), int(order[-2])
    )  # something on either side
    return hashes <= np.uint64(limit), 0


SPLITS = {"tail": _tail, "document": _by_document}


def plan(
    sources: tuple[Source, ...],
    eval_sources: tuple[Source, ...],
    data: config.Data,
    wants_characters: bool = False,
) -> SplitCorpus:
    """Reads everything once. UsageError when there is no text, or too little to hold some out."""
    sizes, hashes, tally, characters = array("q"), array("Q"), Tally(), set()
    for group in (sources, eval_sources):
        size = 0
        for _, document in _read(group, data, tally):
            size = len(document.text)
            if wants_characters:
                characters.update(document.text)
            if group is sources:
                sizes.append(size), hashes.append(text_hash(document.text))
        if group and not size:
            more = f" and {len(group) - 1} more" if group[1:] else ""
            raise UsageError(
                f"{group[0].path}: no text in this file{more}; the data must have some"
            )
    sizes, hashes = np.frombuffer(sizes, np.int64), np.frombuffer(hashes, np.uint64)
    held_out, cut = np.zeros(len(sizes), bool), 0
    if data.eval_fraction and not eval_sources:
        held_out, cut = SPLITS[data.split](sizes, hashes, data.eval_fraction)
    notes = tuple(tally.notes(reading_of(data)))
    return SplitCorpus(
        sources, eval_sources, data, held_out, cut, "".join(sorted(characters)), notes
    )
