"""Tokens and datasets in memory, and one row made by a slow loop."""

from typing import NamedTuple

import numpy as np

from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.dataset import Dataset, Part
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer, with_specials
from gpt_jax.data.tokens.shards import DOCUMENT, Tokens

BYTES = make_byte_tokenizer()


class TokenArray(NamedTuple):
    """Ids in memory, read like those of a TokenFile."""

    ids: np.ndarray
    path = "memory"

    @property
    def dtype(self) -> np.dtype:
        return self.ids.dtype

    @property
    def size(self) -> int:
        return len(self.ids)

    def read(self, start: int, out: np.ndarray) -> None:
        out[:] = self.ids[start : start + len(out)]


def in_memory(name, ids, offsets, size):
    """Tokens that lie in no file, from `size` bytes of text."""
    return Tokens(
        name,
        (TokenArray(ids),),
        np.asarray(offsets, np.int64),
        np.zeros(len(offsets) - 1, DOCUMENT),
        size,
    )


def make_tokens(sizes, seed=0):
    """Documents of `sizes` random bytes, each ended by 256."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(0, 256, size), 256) for size in sizes]
    ids = np.concatenate(documents).astype(np.uint16)
    return in_memory("train", ids, np.cumsum([0, *map(len, documents)]), sum(sizes))


def alone(tokens):
    """A Dataset of one text."""
    return Dataset((Part("text", 1.0, tokens, None),), BYTES, "")


def slow_row(tokens, spans, seq_len, document_mask):
    """One row, token by token, from the documents that it is said to hold."""
    ids, document = [], []
    for number, span in enumerate(spans):
        assert span.column == len(ids)
        start = int(tokens.offsets[span.document]) + span.offset
        ids += tokens.ids(start, start + span.size).tolist()
        document += [number + 1] * span.size
    names = ("tokens", "targets", "weight", "bytes") + (
        ("segment", "position") if document_mask else ()
    )
    out, position = {name: [] for name in names}, 0
    for place in range(seq_len):
        there, next_there = place < len(ids), place + 1 < len(ids)
        new = there and (place == 0 or document[place] != document[place - 1])
        position = 0 if new or not there else position + 1
        learn = next_there and (not document_mask or document[place] == document[place + 1])
        target = ids[place + 1] if next_there else 0
        row = (
            ids[place] if there else 0,
            target,
            learn,
            learn and target < 256,
            document[place] if there else 0,
            position,
        )
        for column, value in zip(out.values(), row, strict=False):
            column.append(int(value))
    return out


def mixed(seed=0):
    """Three sources of different sizes. The third has two shards."""
    parts = [
        make_tokens(np.random.default_rng(seed + i).integers(1, 30, n), seed + i)
        for i, n in enumerate((40, 90, 60))
    ]
    third, cut = parts[2], int(parts[2].offsets[4])
    split = Tokens(
        "train",
        (TokenArray(third.ids(0, cut)), TokenArray(third.ids(cut, third.size))),
        third.offsets,
        third.docs,
        third.bytes,
    )
    return Dataset(
        tuple(
            Part(name, weight, tokens, None)
            for name, weight, tokens in zip(
                "abc", (0.5, 0.3, 0.2), (*parts[:2], split), strict=True
            )
        ),
        with_specials(BYTES, pipeline.FIM_ORDER),
        "",
    )


EVERYTHING = dict(
    document_mask=True, shuffle_documents=True, fim=0.5, block=10, phases=((400, (0.2, 0.2, 0.6)),)
)
