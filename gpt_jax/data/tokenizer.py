"""Text to ids and back: bytes, characters, byte-level BPE, any `tokenizer.json` (called by cache, evals, commands).

Every id stands for fixed bytes, `Tokenizer.pieces[id]`, empty for special tokens. Decoding joins pieces, so it is exact
and can stream; how text becomes ids is one function per kind, a row of `KINDS`.
"""

import codecs
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers

from gpt_jax.errors import UsageError

EOT = "<|endoftext|>"
# End of text in the vocabularies of GPT-2, Llama 3, Llama 1-2 and Mistral, Gemma, DeepSeek, and older lists.
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "<|im_end|>", "[EOS]", "<EOS>")
PART = 1 << 18  # characters encoded at once: enough parts of one long text to keep all threads busy


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One mapping between text and ids below `vocab`.

    Special tokens are never made from text: `<|endoftext|>` inside a document is encoded as ordinary characters.
    """

    kind: str  # a row of KINDS
    name: str  # for people: bytes, char, bpe:4096, or a file's name
    content: str  # what KINDS[kind] needs to make this tokenizer again
    pieces: tuple[bytes, ...]  # bytes of UTF-8 that each id stands for; empty for specials
    eot: int | None  # the id that ends a document; characters have none
    encoder: Callable[[str], np.ndarray]
    cutter: Callable[[str], Iterator[str]]

    @property
    def vocab(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab]: how many bytes of UTF-8 each id stands for; 0 for specials."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share when they encode alike; the name does not count."""
        return hashlib.sha256(f"{self.kind}\0{self.content}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]. UsageError for text that is no Unicode, or a character unknown to a char tokenizer."""
        try:
            return self.encoder(text)
        except UnicodeEncodeError as error:
            raise UsageError(f"text {_around(text, error.start)}: character {error.start} is a lone surrogate, which "
                             "no UTF-8 text contains; remove it") from None

    def parts(self, text: str) -> Iterator[str]:
        """`text` in parts whose encodings, joined, are the encoding of the whole: one long text can use all cores."""
        return self.cutter(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes; an id that stands for nothing (special, or beyond `vocab` in a padded head) adds none."""
        return b"".join(self.pieces[i] for i in map(int, ids) if 0 <= i < len(self.pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """Everything that `from_json` needs; a checkpoint carries it."""
        return json.dumps({"kind": self.kind, "name": self.name, "content": self.content}, ensure_ascii=True)


class StreamDecoder:
    """Text of ids that arrive one by one, never cutting a UTF-8 character.

    >>> decoder = StreamDecoder(byte_tokenizer())
    >>> [decoder.feed(i) for i in "é".encode()] + [decoder.flush()]
    ['', 'é', '']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 20): place + 20])


def _cut_anywhere(text: str) -> Iterator[str]:
    return (text[i: i + PART] for i in range(0, len(text), PART))


# White space as the library's regular expressions have it (Unicode's White_Space); Python's \s holds \x1c to \x1f too.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def _cut_before_space(text: str) -> Iterator[str]:
    """GPT-2's pre-tokenizer never joins a non-space to a space after it, and looks back at nothing."""
    start, boundary = 0, re.compile(rf"[^{SPACE}](?=[{SPACE}])")
    while len(text) - start > PART and (found := boundary.search(text, start + PART - 1)):
        yield text[start: found.end()]
        start = found.end()
    yield text[start:]


def byte_tokenizer(content: str = "", name: str = "bytes") -> Tokenizer:
    """256 byte ids and end of text, 256."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    pieces = tuple(bytes([i]) for i in range(256)) + (b"",)
    return Tokenizer("bytes", name, content, pieces, 256, encode, _cut_anywhere)


def char_tokenizer(content: str, name: str = "char") -> Tokenizer:
    """One id per character of `content`, in code point order (nanoGPT's shakespeare_char/prepare.py); no specials."""
    characters = "".join(sorted(set(content)))
    codes = np.frombuffer(characters.encode("utf-32-le"), "<u4")
    table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # the last entry stands for all code points beyond
    table[codes] = np.arange(len(codes), dtype=np.int32)

    def encode(text: str) -> np.ndarray:
        ids = table[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(table) - 1)]
        if len(unknown := np.flatnonzero(ids < 0)):
            place = int(unknown[0])
            raise UsageError(f"text {_around(text, place)}: character {place}, {text[place]!r}, is not among the "
                             f"{len(characters)} that the char tokenizer knows; leave it out, or train with "
                             "--config.data.tokenizer=bytes")
        return ids

    pieces = tuple(c.encode() for c in characters)
    return Tokenizer("char", name, characters, pieces, None, encode, _cut_anywhere)


def _byte_alphabet() -> dict[str, int]:
    """The printable character for every byte that byte-level BPE uses (GPT-2's encoder.py, bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int] = _byte_alphabet()) -> bytes:
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


# How a decoder turns a token's text into bytes, by the decoder's type in tokenizer.json.
SPELLINGS = {"ByteLevel": _byte_level, "Metaspace": _sentencepiece, "ByteFallback": _sentencepiece}


def _spelling(spec: dict, name: str) -> Callable[[str], bytes]:
    decoder = spec.get("decoder") or {"type": "none"}
    types = [step["type"] for step in decoder.get("decoders", [decoder])]
    for kind in types:
        if kind in SPELLINGS:
            return SPELLINGS[kind]
    raise UsageError(f"tokenizer {name}: its decoder ({', '.join(types)}) does not say which bytes a token stands for; "
                     f"use a tokenizer with one of {', '.join(SPELLINGS)}")


def _is_gpt2_like(spec: dict) -> bool:
    """Whether `_cut_before_space` is exact: GPT-2's own pre-tokenizer, no prefix, nothing that looks across spaces."""
    before, normalizer = spec.get("pre_tokenizer") or {}, spec.get("normalizer")
    added = [t["content"] for t in spec.get("added_tokens", []) if not t["special"]]
    return (before.get("type") == "ByteLevel" and not before.get("add_prefix_space", True)
            and before.get("use_regex", True) and (normalizer is None or normalizer["type"] == "NFC")
            and all(not re.search(r"\S\s", content) for content in added))


def json_tokenizer(content: str, name: str = "tokenizer.json") -> Tokenizer:
    """A tokenizer of the `tokenizers` library from the text of its file; UsageError if it has no end-of-text token."""
    try:
        library, spec = tokenizers.Tokenizer.from_str(content), json.loads(content)
    except Exception as error:  # the library raises plain Exception for a file that is not its own
        raise UsageError(f"tokenizer {name}: not a tokenizer.json of the tokenizers library: {error}") from None
    library.no_truncation(), library.no_padding()
    library.encode_special_tokens = True  # <|endoftext|> in a document is text, not the end of it
    vocab = library.get_vocab(with_added_tokens=True)
    eot = next((vocab[end] for end in EOT_NAMES if end in vocab), None)
    if eot is None:
        raise UsageError(f"tokenizer {name}: has no end-of-text token; add one of {' '.join(EOT_NAMES)}")
    added = library.get_added_tokens_decoder()
    spell, pieces = _spelling(spec, name), [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        special = i == eot or (i in added and added[i].special)
        pieces[i] = b"" if special else token.encode() if i in added else spell(token)

    lost = UTF8_BYTES - {piece[0] for piece in pieces if len(piece) == 1}
    if lost:
        raise UsageError(f"tokenizer {name}: has no token for {len(lost)} of the bytes of UTF-8, such as "
                         f"{bytes([min(lost)])!r}, so it would drop text that needs them; train it with the whole byte "
                         "alphabet or with byte fallback")

    def encode(text: str) -> np.ndarray:
        text.encode()  # the library's own error for a lone surrogate names no place
        # The batch call releases the interpreter's lock, the single one does not; `fast` leaves offsets out.
        return np.array(library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    cutter = _cut_before_space if _is_gpt2_like(spec) else lambda text: iter((text,))
    return Tokenizer("json", name, content, tuple(pieces), eot, encode, cutter)


UTF8_BYTES = frozenset(range(256)) - {0xc0, 0xc1, *range(0xf5, 256)}  # those that occur in it
LARGEST_BPE = 10_000_000
KINDS = {"bytes": byte_tokenizer, "char": char_tokenizer, "json": json_tokenizer}


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` is `text`."""
    saved = json.loads(text)
    return KINDS[saved["kind"]](saved["content"], saved["name"])


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer: `<|endoftext|>`, 256 bytes, then merges, at most `vocab` ids (fewer
    when the text has no pair left that occurs twice)."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=[EOT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator((part for text in texts for part in _cut_before_space(text)), trainer)
    return json_tokenizer(library.to_str(), f"bpe:{vocab}")


def bpe_vocab(spec: str) -> int:
    """N of `bpe:N`, or 0 when `spec` is no such thing; UsageError for an N that cannot be."""
    if not spec.startswith("bpe:"):
        return 0
    if not spec[4:].replace("_", "").isdecimal() or not 257 <= int(spec[4:]) <= LARGEST_BPE:
        raise UsageError(f"config.data.tokenizer = {spec!r}: expected bpe:N with N at least 257 (256 bytes and {EOT}) and "
                         f"at most {LARGEST_BPE:,}")
    return int(spec[4:])


def read_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of a path to a tokenizer.json; UsageError when there is none."""
    path = Path(spec).expanduser()
    try:
        return json_tokenizer(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config.data.tokenizer = {spec!r}: expected bytes, char, bpe:N or the path of a "
                         f"tokenizer.json ({error})") from None
