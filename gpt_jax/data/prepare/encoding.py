"""Texts become ids, in batches that the library encodes on all of its threads."""

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.read.documents import Document
from gpt_jax.data.tasks.example import Example, Span
from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.errors import DataError, UsageError

# Encoded at once. The library needs some 40 bytes a character while it encodes.
BATCH_CHARACTERS = 1 << 20


class Text(NamedTuple):
    """A document after the filters."""

    piece: int
    document: Document
    text: str
    hash: int
    number: int  # of the document among all those of the unit that have text

    @property
    def example(self) -> Example:
        """What is learned of it. A text of several spans is as it was read, see `_filter`."""
        return self.document.example if self.document.spans else Example((Span(self.text),))


@functools.lru_cache(1)
def load_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of a job, loaded once a process because a large vocabulary takes a second."""
    try:
        tokenizer = tokenizer_from_json(path.read_text(encoding="utf-8"))
    except (ValueError, UsageError) as error:
        raise DataError(f"{path}: damaged ({error}); run the command again") from None
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path}: is not the tokenizer of this job; run the command again")
    return tokenizer


class Part(NamedTuple):
    """A part of a text that is encoded by itself."""

    of: Text
    text: str
    learn: bool
    special: bool = False  # whether `text` is the name of a special token
    last: bool = False  # of its text


def split_into_parts(texts: Iterable[Text], tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts of all texts. One part of a long text is held at a time, and the next one."""
    for text in texts:
        parts = _cut(text, tokenizer)
        part = next(parts)
        for following in parts:
            yield part
            part = following
        yield part._replace(last=True)


def _cut(text: Text, tokenizer: Tokenizer) -> Iterator[Part]:
    """The parts of a text. No part holds characters of two spans."""
    for span in text.example.spans:
        for part in (span.text,) if span.special else tokenizer.parts(span.text):
            yield Part(text, part, span.learn, span.special)


def _batch(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _encode_batch(tokenizer: Tokenizer, batch: list[Part]) -> list[np.ndarray]:
    """The ids of each part. Raises UsageError that names the document."""
    ordinary = [part for part in batch if not part.special]
    try:
        encoded = iter(tokenizer.encode_batch([part.text for part in ordinary]))
        return [
            find_special(tokenizer, part.text) if part.special else next(encoded) for part in batch
        ]
    except UsageError:
        for part in ordinary:
            try:
                tokenizer.encode(part.text)
            except UsageError as error:
                raise UsageError(f"{part.of.document.name}: {error}") from None
        raise


def find_special(tokenizer: Tokenizer, name: str) -> np.ndarray:
    """int32 [1]: the id of a special token. Raises UsageError if the tokenizer has none."""
    if name not in tokenizer.specials:
        raise UsageError(
            f"--task: writes the special token {name}, which the tokenizer {tokenizer.name} lacks; "
            "add it, as in --tokenizer=bpe:4096+chat"
        )
    return np.array([tokenizer.specials[name]], np.int32)


def encode(
    parts: Iterable[Part], tokenizer: Tokenizer
) -> Iterator[tuple[list[Part], list[np.ndarray]]]:
    """Batches with their ids.

    One batch is encoded while the one before is written and the one after is read.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in _batch(parts):
            following = batch, thread.submit(_encode_batch, tokenizer, batch)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()
