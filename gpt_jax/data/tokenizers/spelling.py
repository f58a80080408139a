"""The bytes that each token of a tokenizer.json stands for, as its decoder spells them."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from gpt_jax.data.tokenizers.json_fields import list_steps
from gpt_jax.errors import UsageError


def make_byte_alphabet() -> dict[str, int]:
    """The byte that each printable character of byte-level BPE spells.

    It is that of GPT-2's encoder.py, bytes_to_unicode.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    for i, byte in enumerate(others):
        alphabet[chr(256 + i)] = byte
    return alphabet


BYTES = make_byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    if all(letter in BYTES for letter in token):
        return bytes(BYTES[letter] for letter in token)
    return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _spell_bytes(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.encode()


# How a decoder turns a token's text into bytes: the types of its steps, then the function. The
# first row whose types are all there counts.
SPELLINGS = (
    ({"ByteLevel"}, _spell_byte_level),
    ({"Metaspace"}, _spell_sentencepiece),
    ({"ByteFallback", "Replace"}, _spell_sentencepiece),
    ({"ByteFallback"}, _spell_bytes),
)
UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}  # the others never occur


def _choose_spelling(spec: dict, name: str) -> Callable[[str], bytes]:
    """The function of a row of SPELLINGS for a file's decoder.

    Raises UsageError for another decoder, and if the rest of the file does not go with it.
    """
    types = [step["type"] for step in list_steps(spec, "decoder")] or ["none"]
    spell = next((spell for kinds, spell in SPELLINGS if kinds <= set(types)), None)
    if spell is None:
        raise UsageError(
            f"tokenizer {name}: its decoder ({', '.join(types)}) does not say which bytes a token "
            "stands for; use a tokenizer with one of ByteLevel, Metaspace, ByteFallback"
        )

    before = list_steps(spec, "normalizer") + list_steps(spec, "pre_tokenizer")
    takes_bytes = any(step["type"] == "ByteLevel" for step in before)
    if takes_bytes != (spell is _spell_byte_level):
        raise UsageError(
            f"tokenizer {name}: only one of its pre_tokenizer and its decoder is ByteLevel, so "
            "text would not come back; mend the file"
        )
    if not takes_bytes and not spec["model"].get("byte_fallback"):
        raise UsageError(
            f"tokenizer {name}: model.byte_fallback = false: characters that have no token would "
            "be lost; use a tokenizer with byte fallback"
        )
    return spell


def spell_pieces(
    spec: dict, name: str, vocab: Mapping[str, int], added: Mapping[int, Any], specials: set[int]
) -> tuple[bytes, ...]:
    """The bytes that each id stands for, empty for specials.

    Raises UsageError if a byte of UTF-8 has no token, because text with it would be dropped.
    """
    spell = _choose_spelling(spec, name)
    # Byte-level files have added tokens as plain text. In others ▁ is a space there too: Gemma 3
    # adds runs of it.
    is_byte_level = spell is _spell_byte_level
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in specials:
            continue
        pieces[i] = token.encode() if is_byte_level and i in added else spell(token)

    missing = UTF8_BYTES - {piece[0] for piece in pieces if len(piece) == 1}
    if missing:
        raise UsageError(
            f"tokenizer {name}: has no token for {len(missing)} of the bytes of UTF-8, such as "
            f"{bytes([min(missing)])!r}, so it would drop text that needs them; train it with the "
            "whole byte alphabet or with byte fallback"
        )
    return tuple(pieces)
