"""Tokenizer specs: what `config.data.tokenizer` and `gpt-jax prepare --tokenizer` may say.

A run or a prepare calls `resolve_tokenizer` once, at its door. It gets a Tokenizer, or a Spec where
the tokenizer is made from the text, and hands that object on. Nobody behind the door sees the text.

A spec is one of these.

    bytes                        256 bytes
    char                         the characters of the text
    bpe:VOCAB[:PATTERN]          byte-level BPE trained on the text
    a path                       a tokenizer file or a folder of them, see files.py; or a folder
                                 that gpt-jax prepare made, whose own tokenizer it is

PATTERN is a row of bpe.PATTERNS, gpt2 if left out. Any of them may be followed by +NAME, in any
number. Each adds the special tokens of a row of vocabulary.SPECIALS, as in `bpe:4096+chat+fim`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt_jax.data.tokenizers.bpe import PATTERNS, make_json_tokenizer, train_bpe
from gpt_jax.data.tokenizers.files import make_sentencepiece_tokenizer, read_tokenizer
from gpt_jax.data.tokenizers.llama2c import make_llama2c_tokenizer
from gpt_jax.data.tokenizers.vocabulary import (
    EOT,
    SPECIALS,
    Tokenizer,
    make_byte_tokenizer,
    make_char_tokenizer,
    with_extra,
    with_frame,
    with_specials,
)
from gpt_jax.errors import UsageError
from gpt_jax.schema import Each, read_json

SMALLEST_BPE = 257  # 256 bytes and end of text
LARGEST_BPE = 10_000_000  # a typing error rather than a vocabulary
SPEC_KINDS = {
    "bytes": make_byte_tokenizer,
    "char": make_char_tokenizer,
    "json": make_json_tokenizer,
    "sentencepiece": make_sentencepiece_tokenizer,
    "llama2c": make_llama2c_tokenizer,
}
# What `Tokenizer.to_json` writes.
SAVED_SCHEMA = {
    "kind": set(SPEC_KINDS),
    "name": "text",
    "content": "text",
    "extra?": Each("count"),
    "begin?": "count",
    "ends?": ["count"],
}


class Spec(NamedTuple):
    """A spec taken apart."""

    name: str  # the spec as typed, which names the tokenizer that is made from it
    base: str  # bytes, char, bpe, or a path
    vocab: int  # the size of bpe, else 0
    pattern: str  # the pattern of bpe, else empty
    specials: tuple[str, ...]  # names of the special tokens to add

    @property
    def needs_text(self) -> bool:
        """Whether the tokenizer is made from the text."""
        return self.base == "char" or self.vocab > 0  # a path may be called bpe

    @property
    def needs_characters(self) -> bool:
        """Whether the tokenizer is made from all characters of the text."""
        return self.base == "char"


def parse_tokenizer_spec(spec: str, field: str = "config.data.tokenizer") -> Spec:
    """Takes a spec apart, without a look at the files of a path.

    Raises UsageError, naming `field`, for a BPE or a special token that cannot be.
    """
    base, names = _split_off_specials(spec)
    if unknown := [name for name in names if name not in SPECIALS]:
        known = ", +".join(SPECIALS)
        raise UsageError(
            f"{field} = {spec!r}: +{unknown[0]} adds nothing known; choose from +{known}"
        )
    specials = tuple(token for name in names for token in SPECIALS[name])

    if not base.startswith("bpe:"):
        return Spec(spec, base, 0, "", specials)

    size, _, pattern = base.removeprefix("bpe:").partition(":")
    if not size.replace("_", "").isdecimal() or not SMALLEST_BPE <= int(size) <= LARGEST_BPE:
        raise UsageError(
            f"{field} = {spec!r}: expected bpe:N with N at least {SMALLEST_BPE} "
            f"(256 bytes and {EOT}) and at most {LARGEST_BPE:,}"
        )
    if (pattern or "gpt2") not in PATTERNS or base.endswith(":"):
        known = ", ".join(PATTERNS)
        raise UsageError(f"{field} = {spec!r}: unknown pattern {pattern!r}; choose one of {known}")
    return Spec(spec, "bpe", int(size), pattern or "gpt2", specials)


def _split_off_specials(spec: str) -> tuple[str, list[str]]:
    """The part before the special tokens, and the names after it. A path may contain a +."""
    base, *names = spec.split("+")
    is_path = base not in ("bytes", "char") and not base.startswith("bpe:")
    while is_path and names and names[0] not in SPECIALS:
        base += "+" + names.pop(0)
    return base, names


def resolve_tokenizer(spec: str, field: str = "config.data.tokenizer") -> Tokenizer | Spec:
    """The tokenizer that a spec names, or its Spec if the tokenizer is made from the text.

    An empty spec means bytes. Raises UsageError, naming `field`, for a spec that cannot be and for
    a file that is missing or is no tokenizer.
    """
    parsed = parse_tokenizer_spec(spec, field)
    if parsed.needs_text:
        return parsed

    if parsed.base in ("", "bytes"):
        base = make_byte_tokenizer()
    else:
        base = read_saved(parsed.base) or read_tokenizer(parsed.base, field)
    name = base.name + spec.removeprefix(parsed.base)
    return replace(with_specials(base, parsed.specials), name=name)


def read_saved(path: str) -> Tokenizer | None:
    """The tokenizer that a `to_json` wrote at a path, or in that folder. None for other files."""
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            place = place / "tokenizer.json"
        return tokenizer_from_json(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Misfit is one: another tool wrote it.
        return None


def make_tokenizer(
    spec: Spec, texts: Callable[[], Iterable[str]], characters: str = ""
) -> Tokenizer:
    """Makes the tokenizer of a spec from text: `char` from `characters`, BPE from `texts()`."""
    if spec.needs_characters:
        tokenizer = make_char_tokenizer(characters)
    else:
        tokenizer = train_bpe(texts(), spec.vocab, spec.pattern)
    return replace(with_specials(tokenizer, spec.specials), name=spec.name)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` is `text`.

    Raises Misfit if no `to_json` has written it, and UsageError if it is no sound tokenizer.
    """
    saved = read_json(text, SAVED_SCHEMA)
    tokenizer = SPEC_KINDS[saved["kind"]](saved["content"], saved["name"])
    tokenizer = with_extra(tokenizer, saved.get("extra", {}))
    begin = saved.get("begin", tokenizer.begin)
    return with_frame(tokenizer, begin, saved.get("ends", ()))
