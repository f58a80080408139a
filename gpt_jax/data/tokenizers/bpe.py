"""Byte-level BPE and any `tokenizer.json`, by the `tokenizers` library (called by tokenizer and
tokenizer_files)."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from gpt_jax.data.tokenizers import vocabulary
from gpt_jax.data.tokenizers.vocabulary import EOT, EOT_NAMES, SPECIALS, Tokenizer
from gpt_jax.errors import UsageError

# White space as the library's regular expressions have it (Unicode's White_Space); Python's \s
# holds \x1c to \x1f too.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
BEFORE_SPACE = re.compile(rf"[^{SPACE}](?=[{SPACE}])")
AT_LINES = re.compile(
    rf"[^{SPACE}](?=[\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000])"
    rf"|[\r\n](?=[^{SPACE}])"
)
MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


class Pattern(NamedTuple):
    """How text falls into the words that BPE never merges across."""

    regex: str  # empty: the library's own, GPT-2's
    # the last character before a place where every text may be cut: no word spans it or looks
    # across
    end: re.Pattern


# gpt2: words with the space before them, runs of digits, runs of signs (GPT-2's encoder.py); also
# r50k and p50k. cl100k: as GPT-4 and Llama 3: words take any one sign before them, digits fall into
# threes, signs take line ends. digits: the same with every digit a token (Qwen 2): numbers of one
# length always look alike, however they are written. A rule for cutting holds if no word spans it:
# GPT-2's words have spaces in front only, and of the others signs take line ends too, while nothing
# but spaces comes before a line end's own word.
PATTERNS = {
    "gpt2": Pattern("", BEFORE_SPACE),
    "cl100k": Pattern(MODERN % r"\p{N}{1,3}", AT_LINES),
    "digits": Pattern(MODERN % r"\p{N}", AT_LINES),
}


def _cut(text: str, end: re.Pattern) -> Iterator[str]:
    start, part = 0, vocabulary.PART
    while len(text) - start > part and (found := end.search(text, start + part - 1)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def pre_tokenizer(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """The library's for a row of PATTERNS."""
    before, regex = tokenizers.pre_tokenizers, PATTERNS[pattern].regex
    if not regex:
        return before.ByteLevel(add_prefix_space=False)
    return before.Sequence(
        [
            before.Split(tokenizers.Regex(regex), "isolated"),
            before.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def bpe_json(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    pattern: str,
    specials: Iterable[str],
    ignore_merges: bool = False,
) -> str:
    """The text of a tokenizer.json: byte-level BPE with these tokens, of which `specials` are
    special."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizer(pattern), tokenizers.decoders.ByteLevel()
    spec = json.loads(library.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": vocab[name], "content": name, **flags, "special": True} for name in specials
    ]
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    return json.dumps(spec, ensure_ascii=False)


def train_bpe(texts: Iterable[str], vocab: int, pattern: str = "gpt2") -> Tokenizer:
    """Byte-level BPE with the pre-tokenizer of a row of PATTERNS: `<|endoftext|>`, 256 bytes,
    then merges, at most `vocab` ids (fewer when the text has no pair left that occurs twice)."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizer(pattern), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[EOT],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(
        (part for text in texts for part in _cut(text, PATTERNS[pattern].end)), trainer
    )
    return json_tokenizer(
        library.to_str(), f"bpe:{vocab}" if pattern == "gpt2" else f"bpe:{vocab}:{pattern}"
    )


def byte_alphabet() -> dict[str, int]:
    """The printable character for every byte that byte-level BPE uses (GPT-2's encoder.py,
    bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int] = byte_alphabet()) -> bytes:
    return (
        bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
    )


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


# How a decoder turns a token's text into bytes, by the decoder's type in tokenizer.json.
SPELLINGS = {"ByteLevel": _byte_level, "Metaspace": _sentencepiece, "ByteFallback": _sentencepiece}
UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}  # those that occur in it


def _steps(part: dict | None, inside: str) -> list[dict]:
    """The steps of one part of a tokenizer.json, which may be a sequence, under `inside`, or
    nothing."""
    return part.get(inside, [part]) if part else []


def _spelling(spec: dict, name: str) -> Callable[[str], bytes]:
    types = [step["type"] for step in _steps(spec.get("decoder"), "decoders")] or ["none"]
    for kind in types:
        if kind in SPELLINGS:
            return SPELLINGS[kind]
    raise UsageError(
        f"tokenizer {name}: its decoder ({', '.join(types)}) does not say which bytes a token stands for; "
        f"use a tokenizer with one of {', '.join(SPELLINGS)}"
    )


def _own_words(before: list[dict]) -> re.Pattern | None:
    """Where a text may be cut if these steps of a pre-tokenizer are those of a row of PATTERNS."""
    *split, last = before or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    whole = all(
        (s.get("behavior"), s.get("invert")) in (("Isolated", False), ("Removed", True))
        for s in split
    )
    regexes = [(s.get("pattern") or {}).get("Regex") for s in split] + [""] * last.get(
        "use_regex", True
    )
    return next((p.end for p in PATTERNS.values() if whole and regexes == [p.regex]), None)


def _cutter(spec: dict) -> Callable[[str], Iterator[str]]:
    """Exact only without a normaliser that looks across the cut, and without added tokens that
    span it."""
    end, normalizer = (
        _own_words(_steps(spec.get("pre_tokenizer"), "pretokenizers")),
        spec.get("normalizer"),
    )
    added = [t for t in spec.get("added_tokens", []) if not t["special"]]
    spans = any(t["lstrip"] or t["rstrip"] or re.search(r"\s", t["content"]) for t in added)
    if not end or spans or (normalizer and normalizer["type"] != "NFC"):
        return lambda text: iter((text,))
    return lambda text: _cut(text, end)


def _prefix(spec: dict) -> bytes:
    """The space that Llama 2's kind of tokenizer puts in front and its decoder takes away."""

    def strips(step: dict) -> bool:
        return (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0) or (
            step["type"] == "Metaspace"
            and step.get("prepend_scheme", "always") != "never"
            and step.get("add_prefix_space", True)
        )

    return b" " if any(map(strips, _steps(spec.get("decoder"), "decoders"))) else b""


def _lossless(spec: dict) -> bool:
    """Whether every text comes back: bytes all the way, with nothing put in, taken away or
    normalised."""
    before = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    kept = {
        "ByteLevel": lambda s: not s.get("add_prefix_space", True),
        "Digits": lambda s: True,
        "Split": lambda s: s["behavior"] != "Removed" or s["invert"],
    }
    return (
        not spec.get("normalizer")
        and any(s["type"] == "ByteLevel" for s in before)
        and all(s["type"] in kept and kept[s["type"]](s) for s in before)
    )


def _open(content: str, name: str) -> tuple[tokenizers.Tokenizer, dict]:
    """(the library's tokenizer, its parsed file). Chat and fill-in-the-middle tokens that the
    file adds as ordinary ones (Qwen 2.5 does) become special, so that no text makes them."""
    try:
        spec, known = (
            json.loads(content),
            {token for tokens in SPECIALS.values() for token in tokens},
        )
        hidden = [
            t for t in spec.get("added_tokens") or [] if t["content"] in known and not t["special"]
        ]
        for token in hidden:
            token["special"] = True
        library = tokenizers.Tokenizer.from_str(json.dumps(spec) if hidden else content)
    except Exception as error:  # the library raises plain Exception for a file that is not its own
        raise UsageError(
            f"tokenizer {name}: not a tokenizer.json of the tokenizers library: {error}"
        ) from None
    library.no_truncation(), library.no_padding()
    library.encode_special_tokens = True  # <|endoftext|> in a document is text, not the end of it
    return library, spec


def json_tokenizer(content: str, name: str = "tokenizer.json") -> Tokenizer:
    """A tokenizer of the `tokenizers` library from the text of its file; UsageError if it has no
    end-of-text token or would drop text. One with a normaliser (NFC, spaces as ▁) is not
    `lossless`."""
    library, spec = _open(content, name)
    vocab = library.get_vocab(with_added_tokens=True)
    end = next((end for end in EOT_NAMES if end in vocab), None)
    if end is None:
        raise UsageError(
            f"tokenizer {name}: has no end-of-text token; add one of {' '.join(EOT_NAMES)}"
        )
    added = library.get_added_tokens_decoder()
    specials = {end: vocab[end]} | {
        token.content: i for i, token in sorted(added.items()) if token.special
    }
    spell, pieces, special_ids = (
        _spelling(spec, name),
        [b""] * (max(vocab.values()) + 1),
        set(specials.values()),
    )
    for token, i in vocab.items():
        pieces[i] = b"" if i in special_ids else token.encode() if i in added else spell(token)
    lost = UTF8_BYTES - {piece[0] for piece in pieces if len(piece) == 1}
    if lost:
        raise UsageError(
            f"tokenizer {name}: has no token for {len(lost)} of the bytes of UTF-8, such as "
            f"{bytes([min(lost)])!r}, so it would drop text that needs them; train it with the whole byte "
            "alphabet or with byte fallback"
        )

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            text.encode()  # the library's own error for a lone surrogate names no place
        # The batch call releases the interpreter's lock, the single one does not; `fast` leaves
        # offsets out.
        found = library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.fromiter(ids, np.int32, len(ids)) for ids in (one.ids for one in found)]

    return Tokenizer(
        "json",
        name,
        content,
        tuple(pieces),
        vocab[end],
        encode,
        _cutter(spec),
        specials,
        prefix=_prefix(spec),
        lossless=_lossless(spec),
    )
