"""Which text is held out.

`plan_split` reads the sources once and decides. `SplitCorpus.texts` reads them again and says of
each text on which side it falls. Two readings instead of one keep memory at one document, whatever
the size of the corpus.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt_jax import config
from gpt_jax.data.read.decoding import Reading
from gpt_jax.data.read.documents import Document, Tally, read_documents, whole_piece
from gpt_jax.data.read.sources import Source
from gpt_jax.data.tokens.shards import hash_text
from gpt_jax.errors import DataError, UsageError

TRAIN = "train"
EVAL = "eval"


@dataclass(frozen=True, eq=False)
class SplitCorpus:
    """Sources with a decision for every document."""

    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...]
    data: config.Data
    held_out: np.ndarray  # bool [documents of `sources`]
    cut: int  # the character at which the only document is cut in two; 0: it is not cut
    characters: str  # all that occur, sorted; empty unless they were asked for
    notes: tuple[str, ...]  # what the reading has to tell, a line each

    def texts(self) -> Iterator[tuple[str, int, Document]]:
        """(side, number of the source, document), in the order they are read.

        `eval_sources` are numbered after `sources`. Raises DataError if the sources have changed
        since they were planned.
        """
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
        """The texts of one side."""
        return (document.text for where, _, document in self.texts() if where == side)


def make_reading(data: config.Data) -> Reading:
    """How a run reads its text. Raises UsageError for settings that mean nothing."""
    try:
        return Reading(
            data.field,
            data.errors,
            data.encodings,
            documents=data.documents,
            separator=data.separator,
        )
    except UsageError as error:
        raise UsageError(f"config.data.{error}") from None


def _read(
    sources: Sequence[Source], data: config.Data, tally: Tally | None = None
) -> Iterator[tuple[int, Document]]:
    """(number of the source, document), in order."""
    reading = make_reading(data)
    for number, source in enumerate(sources):
        for document in read_documents((whole_piece(source),), reading, tally):
            yield number, document


# ---- ways to split ----


def _split_tail(sizes: np.ndarray, hashes: np.ndarray, fraction: float) -> tuple[np.ndarray, int]:
    """Holds out the last part by position.

    A single document is cut, as nanoGPT cuts its file. Of many, those that begin after the cut are
    held out, and at least the last.
    """
    cut = int(sizes.sum() * (1 - fraction))
    if len(sizes) == 1:
        if not 0 < cut < sizes[0]:
            raise UsageError(
                f"config.data.eval_fraction = {fraction}: leaves no text on one side of a document "
                f"of {sizes[0]} characters; give more text or config.data.eval_path"
            )
        return np.zeros(1, bool), cut

    held_out = np.cumsum(sizes) - sizes >= cut
    held_out[0] = False
    held_out[-1] = True
    return held_out, 0


def _split_by_document(
    sizes: np.ndarray, hashes: np.ndarray, fraction: float
) -> tuple[np.ndarray, int]:
    """Holds out documents by a hash of their text alone.

    Added documents move none across, and copies of one text stay together.
    """
    order = np.unique(hashes)
    if len(order) < 2:
        raise UsageError(
            "config.data.split = 'document': needs at least two different documents and there is "
            "one; use --config.data.split=tail or give config.data.eval_path"
        )
    # The smallest hash is always held out and the largest never, so both sides have text.
    limit = max(int(fraction * 2.0**64), int(order[0]))
    limit = min(limit, int(order[-2]))
    return hashes <= np.uint64(limit), 0


SPLITS = {"tail": _split_tail, "document": _split_by_document}


def plan_split(
    sources: tuple[Source, ...],
    eval_sources: tuple[Source, ...],
    data: config.Data,
    wants_characters: bool = False,
) -> SplitCorpus:
    """Reads everything once, and decides what is held out.

    Raises UsageError when there is no text, or too little to hold some out.
    """
    sizes = array("q")
    hashes = array("Q")
    tally = Tally()
    characters: set[str] = set()

    for group in (sources, eval_sources):
        size = 0
        for _, document in _read(group, data, tally):
            size = len(document.text)
            if wants_characters:
                characters.update(document.text)
            if group is sources:
                sizes.append(size)
                hashes.append(hash_text(document.text))
        if group and not size:
            more = f" and {len(group) - 1} more" if group[1:] else ""
            raise UsageError(
                f"{group[0].path}: no text in this file{more}; the data must have some"
            )

    held_out = np.zeros(len(sizes), bool)
    cut = 0
    if data.eval_fraction and not eval_sources:
        split = SPLITS[data.split]
        held_out, cut = split(
            np.frombuffer(sizes, np.int64), np.frombuffer(hashes, np.uint64), data.eval_fraction
        )
    notes = tuple(tally.notes(make_reading(data)))
    return SplitCorpus(
        sources, eval_sources, data, held_out, cut, "".join(sorted(characters)), notes
    )
