"""What a tokenizer is, its special tokens, and the two kinds that need no library.

Every id stands for fixed bytes, `Tokenizer.pieces[id]`, which are empty for special tokens.
Decoding joins pieces, so it is exact and can stream. Each kind brings a function that encodes.
"""

import codecs
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gpt_jax.errors import UsageError

EOT = "<|endoftext|>"
# End of text in the vocabularies of GPT-2, Llama 3, Llama 1-2 and Mistral, Gemma, DeepSeek, and
# older lists.
EOT_NAMES = (
    EOT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
    "<|im_end|>",
    "[EOS]",
    "<EOS>",
)
# A turn is <|im_start|>role\n...<|im_end|>\n: ChatML, of OpenAI, Qwen and others. Two tokens serve
# any role.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# Prefix, suffix, then the middle to be filled in, with the names of cl100k and Qwen (Bavarian et
# al. 2022).
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
SPECIALS = {"chat": CHAT_TOKENS, "fim": FIM_TOKENS}  # +chat and +fim after a spec
PART = 1 << 18  # characters encoded at once: one long text has enough parts for all threads


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One mapping between text and ids below `vocab`.

    Special tokens are never made from text: `<|endoftext|>` inside a document is encoded as
    ordinary characters.
    """

    kind: str  # a row of spec.SPEC_KINDS
    name: str  # for people: bytes, char, bpe:4096, or a file's name
    content: str  # what the row of `kind` needs to make this tokenizer again
    pieces: tuple[bytes, ...]  # bytes of UTF-8 that each id stands for; empty for specials
    eot: int | None  # the id that ends a document; characters have none
    encoder: Callable[[Sequence[str]], list[np.ndarray]]
    cutter: Callable[[str], Iterator[str]]
    # Every special token by name, end of text included.
    specials: Mapping[str, int] = field(default_factory=dict)
    # Those of `specials` that are not in `content`.
    extra: Mapping[str, int] = field(default_factory=dict)
    # What encoding puts before a text and decoding takes away: a space in the manner of Llama 2.
    prefix: bytes = b""
    # False: some texts come back changed (normalised, unknown characters, ▁ for a space).
    lossless: bool = True
    # The id for characters that have no id of their own. None: every character has ids.
    unknown: int | None = None
    # The id that a model of others expects before each text. Models that are trained here see texts
    # parted by `eot` alone, and have none.
    begin: int | None = None
    # Further ids that end a text of such a model, as the end of a turn does.
    ends: tuple[int, ...] = ()
    # What a person must know of how the file is read, a line each.
    notes: tuple[str, ...] = ()

    @property
    def vocab(self) -> int:
        """How many ids there are."""
        return len(self.pieces)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab]: how many bytes of UTF-8 each id stands for.

        Specials count 0, and so does `unknown`. Its " ⁇ " is not what the text had, and its length
        must not flatter bits per byte.
        """
        sizes = [len(piece) for piece in self.pieces]
        if self.unknown is not None:
            sizes[self.unknown] = 0
        return np.array(sizes, np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two tokenizers share when they encode alike, whatever their names."""
        extra = f"\0{json.dumps(dict(self.extra))}" if self.extra else ""
        return hashlib.sha256(f"{self.kind}\0{self.content}{extra}".encode()).hexdigest()[:16]

    def extends(self, other: "Tokenizer") -> bool:
        """Whether every id of `other` stands for the same bytes, or the same special token, here.

        This one may have further ids after those.
        """
        has_specials = other.specials.items() <= self.specials.items()
        return has_specials and self.pieces[: other.vocab] == other.pieces

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens].

        Raises UsageError if the text is no Unicode, or if a char tokenizer does not know one of
        its characters.
        """
        return self.encode_batch((text,))[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [tokens] of each text, by one call of the library on all of its threads.

        Raises UsageError as `encode` does.
        """
        try:
            return self.encoder(texts)
        except UnicodeEncodeError as error:  # it carries the text that has the surrogate
            raise UsageError(
                f"text {quote_around(error.object, error.start)}: character {error.start} is a "
                "lone surrogate, which no UTF-8 text contains; remove it"
            ) from None

    def lost(self, text: str, ids: np.ndarray) -> int:
        """Bytes in UTF-8 of the characters of `text` that its encoding `ids` has as `unknown`."""
        if self.unknown is None or not (ids == self.unknown).any():
            return 0
        unknown = [letter for letter in set(text) if self._is_unknown(letter)]
        return sum(text.count(letter) * len(letter.encode()) for letter in unknown)

    @functools.cached_property
    def _is_unknown(self) -> Callable[[str], bool]:
        """Whether a character is encoded as `unknown`; each is encoded once."""
        return functools.cache(lambda letter: self.unknown in self.encode(letter))

    def parts(self, text: str) -> Iterator[str]:
        """`text` in parts whose encodings, joined, are the encoding of the whole.

        So that one long text can use all cores.
        """
        return self.cutter(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`.

        Special ids add none, and neither do ids beyond `vocab`, which a padded head may give.
        """
        return b"".join(self.pieces[i] for i in map(int, ids) if 0 <= i < len(self.pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose encoding is `ids`, without `prefix`.

        Bytes that are no UTF-8 become U+FFFD.
        """
        return self.decode_bytes(ids).removeprefix(self.prefix).decode("utf-8", "replace")

    def to_json(self) -> str:
        """Everything that `tokenizer_from_json` needs; a checkpoint carries it."""
        saved: dict = {"kind": self.kind, "name": self.name, "content": self.content}
        if self.extra:
            saved["extra"] = dict(self.extra)
        if self.begin is not None:
            saved["begin"] = self.begin
        if self.ends:
            saved["ends"] = list(self.ends)
        return json.dumps(saved, ensure_ascii=True)


class StreamDecoder:
    """Text of ids that arrive one by one, never cutting a UTF-8 character.

    The text continues another one, so a tokenizer's `prefix` stays in it. Where it `starts` a text,
    the prefix is taken away.

    >>> decoder = StreamDecoder(make_byte_tokenizer())
    >>> [decoder.feed(i) for i in "é".encode()] + [decoder.flush()]
    ['', 'é', '']
    """

    def __init__(self, tokenizer: Tokenizer, starts: bool = False):
        self._tokenizer = tokenizer
        self._prefix = tokenizer.prefix if starts else b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        raw = self._tokenizer.decode_bytes([token])
        if raw:
            raw = raw.removeprefix(self._prefix)
            self._prefix = b""
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


def with_specials(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """`tokenizer` with these special tokens.

    A special token that it already has keeps its id. The others get the ids after its vocabulary,
    in the order given. Raises UsageError for a name that is an ordinary token.

    >>> with_specials(make_byte_tokenizer(), ["<|a|>", "<|endoftext|>", "<|b|>"]).specials
    {'<|endoftext|>': 256, '<|a|>': 257, '<|b|>': 258}
    """
    new = [name for name in dict.fromkeys(names) if name not in tokenizer.specials]
    return with_extra(tokenizer, {name: tokenizer.vocab + i for i, name in enumerate(new)})


def with_extra(tokenizer: Tokenizer, extra: Mapping[str, int]) -> Tokenizer:
    """`tokenizer` with more special tokens by name and id, none of which is in use.

    Raises UsageError for a name that is an ordinary token, and for an id that is not among the next
    ones. A damaged file with a huge id would otherwise take all memory.
    """
    for name, i in extra.items():
        if not tokenizer.vocab <= i < tokenizer.vocab + len(extra):
            raise UsageError(
                f"special token {name!r}: has the id {i}, and the tokenizer {tokenizer.name} goes "
                f"on at {tokenizer.vocab}; use the file that belongs to it"
            )
    for name in extra:
        if name.encode() in tokenizer.pieces:
            raise UsageError(
                f"special token {name!r}: is an ordinary token of the tokenizer {tokenizer.name}; "
                "choose another name"
            )

    size = max([tokenizer.vocab, *(i + 1 for i in extra.values())])
    return replace(
        tokenizer,
        pieces=tokenizer.pieces + (b"",) * (size - tokenizer.vocab),
        specials={**tokenizer.specials, **extra},
        extra={**tokenizer.extra, **extra},
    )


def with_frame(tokenizer: Tokenizer, begin: int | None, ends: Sequence[int]) -> Tokenizer:
    """`tokenizer` with the id before each text, and the ids that end one beside `eot`.

    Raises UsageError for an id that it does not have.
    """
    for i in [*ends, *([] if begin is None else [begin])]:
        if not 0 <= i < tokenizer.vocab:
            raise UsageError(f"tokenizer {tokenizer.name}: has no token {i} to frame a text with")
    others = sorted(set(ends) - {tokenizer.eot})
    return replace(tokenizer, begin=begin, ends=tuple(others))


def quote_around(text: str, place: int) -> str:
    """The text around a place, in quotes, for messages."""
    return repr(text[max(0, place - 20) : place + 20])


def _cut_anywhere(text: str) -> Iterator[str]:
    return (text[i : i + PART] for i in range(0, len(text), PART))


def make_byte_tokenizer(content: str = "", name: str = "bytes") -> Tokenizer:
    """256 byte ids and end of text, 256."""

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    pieces = (*(bytes([i]) for i in range(256)), b"")
    return Tokenizer("bytes", name, content, pieces, 256, encode, _cut_anywhere, {EOT: 256})


def make_char_tokenizer(content: str, name: str = "char") -> Tokenizer:
    """One id per character of `content`, in code point order, and no specials.

    The order is that of nanoGPT's shakespeare_char/prepare.py.
    """
    characters = "".join(sorted(set(content)))
    codes = np.frombuffer(characters.encode("utf-32-le"), "<u4")
    beyond = int(codes.max(initial=0)) + 1  # stands for all code points after the last known one
    table = np.full(beyond + 1, -1, np.int32)
    table[codes] = np.arange(len(codes), dtype=np.int32)

    def encode(text: str) -> np.ndarray:
        ids = table[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), beyond)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            place = int(unknown[0])
            raise UsageError(
                f"text {quote_around(text, place)}: character {place}, {text[place]!r}, is not "
                f"among the {len(characters)} that the char tokenizer knows; leave it out, or "
                "train with --config.data.tokenizer=bytes"
            )
        return ids

    def encode_all(texts: Sequence[str]) -> list[np.ndarray]:
        return [encode(text) for text in texts]

    pieces = tuple(character.encode() for character in characters)
    return Tokenizer("char", name, characters, pieces, None, encode_all, _cut_anywhere)
