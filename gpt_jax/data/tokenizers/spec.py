"""The door to tokenizers: a spec (`config.data.tokenizer`, `gpt-jax prepare --tokenizer`) or what a
checkpoint saved becomes a `Tokenizer` (called by cache, store, load and commands).

A spec is one of
    bytes                        256 bytes
    char                         the characters of the text
    bpe:VOCAB[:PATTERN]          byte-level BPE trained on the text; PATTERN is a row of bpe.PATTERNS, gpt2 if left out
    a path                       *.json, *.model (SentencePiece), *.tiktoken[:PATTERN] (cl100k if left out), or a
                                 folder of encoder.json + vocab.bpe, vocab.json + merges.txt or tokenizer.json
and after any of them +NAME, in any number, adds the special tokens of a row of vocabulary.SPECIALS,
as in `bpe:4096+chat+fim`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from gpt_jax.data.tokenizers.bpe import PATTERNS, json_tokenizer, train_bpe
from gpt_jax.data.tokenizers.files import read_tokenizer, sentencepiece_tokenizer
from gpt_jax.data.tokenizers.vocabulary import (
    EOT,
    SPECIALS,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    with_extra,
    with_specials,
)
from gpt_jax.errors import UsageError

LARGEST_BPE = 10_000_000
SPEC_KINDS = {
    "bytes": byte_tokenizer,
    "char": char_tokenizer,
    "json": json_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
}


class Spec(NamedTuple):
    """A spec taken apart."""

    base: str  # bytes, char, bpe, or a path
    vocab: int  # of bpe, else 0
    pattern: str  # of bpe, else empty
    specials: tuple[str, ...]  # names of the special tokens to add


def parse_tokenizer_spec(spec: str, field: str = "config.data.tokenizer") -> Spec:
    """`spec` in parts; UsageError, naming `field`, for a BPE that cannot be. Paths are not
    looked at."""
    base, *names = spec.split("+")
    while (
        names
        and names[0] not in SPECIALS
        and base not in ("bytes", "char")
        and not base.startswith("bpe:")
    ):
        base += "+" + names.pop(0)  # a path may hold a +
    if unknown := [name for name in names if name not in SPECIALS]:
        raise UsageError(
            f"{field} = {spec!r}: +{unknown[0]} adds nothing known; choose from +{', +'.join(SPECIALS)}"
        )
    specials = tuple(token for name in names for token in SPECIALS[name])
    if not base.startswith("bpe:"):
        return Spec(base, 0, "", specials)
    size, _, pattern = base[4:].partition(":")
    if not size.replace("_", "").isdecimal() or not 257 <= int(size) <= LARGEST_BPE:
        raise UsageError(
            f"{field} = {spec!r}: expected bpe:N with N at least 257 (256 bytes and {EOT}) and at most "
            f"{LARGEST_BPE:,}"
        )
    if (pattern or "gpt2") not in PATTERNS or base.endswith(":"):
        raise UsageError(
            f"{field} = {spec!r}: unknown pattern {pattern!r}; choose one of {', '.join(PATTERNS)}"
        )
    return Spec("bpe", int(size), pattern or "gpt2", specials)


def bpe_vocab(spec: str) -> int:
    """N of `bpe:N`, or 0 when `spec` is no such thing; UsageError for an N that cannot be."""
    return parse_tokenizer_spec(spec).vocab


def is_char(spec: str) -> bool:
    """Whether the tokenizer is made of all characters that occur in the text."""
    return parse_tokenizer_spec(spec).base == "char"


def find_known_tokenizer(spec: str, field: str = "config.data.tokenizer") -> Tokenizer | None:
    """The tokenizer of a spec (of none: bytes), or None if it is made from the text; UsageError
    for one that cannot be had."""
    base, vocab, _, specials = parse_tokenizer_spec(spec, field)
    if base == "char" or vocab:
        return None
    found = byte_tokenizer() if base in ("", "bytes") else read_tokenizer(base, field)
    return replace(with_specials(found, specials), name=found.name + spec[len(base) :])


def made_tokenizer(
    spec: str, texts: Callable[[], Iterable[str]], characters: str = ""
) -> Tokenizer:
    """The tokenizer of a spec that `known_tokenizer` knows none for: `char` from `characters`,
    BPE from `texts()`. Its name is the spec."""
    base, vocab, pattern, specials = parse_tokenizer_spec(spec)
    made = char_tokenizer(characters) if base == "char" else train_bpe(texts(), vocab, pattern)
    return replace(with_specials(made, specials), name=spec)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` is `text`."""
    saved = json.loads(text)
    return with_extra(
        SPEC_KINDS[saved["kind"]](saved["content"], saved["name"]), saved.get("extra", {})
    )
