"""Byte-level BPE and any `tokenizer.json`, by the `tokenizers` library.

`train_bpe` makes a tokenizer from text, `make_json_tokenizer` one from the text of a file. Both can
encode a long text in parts, and the ids are those of the whole.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import tokenizers

from gpt_jax.data.tokenizers import json_fields, vocabulary
from gpt_jax.data.tokenizers.json_fields import list_steps
from gpt_jax.data.tokenizers.promises import check_promises, find_made
from gpt_jax.data.tokenizers.spelling import spell_pieces
from gpt_jax.data.tokenizers.vocabulary import CHAT_TOKENS, EOT, EOT_NAMES, SPECIALS, Tokenizer
from gpt_jax.errors import UsageError

# White space as the library's regular expressions have it (Unicode's White_Space). Python's \s
# also has \x1c to \x1f.
WIDE_SPACE = r" \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
INLINE_SPACE = r"\t\x0b\x0c" + WIDE_SPACE  # without the ends of lines
SPACE = r"\t-\r" + WIDE_SPACE

BEFORE_SPACE = re.compile(rf"[^{SPACE}](?=[{SPACE}])")
AT_LINES = re.compile(rf"[^{SPACE}](?=[{INLINE_SPACE}])|[\r\n](?=[^{SPACE}])")
MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Pattern(NamedTuple):
    """How text falls into the words that BPE never merges across."""

    regex: str  # empty means the library's own, which is GPT-2's
    # The last character before a place where every text may be cut. No word spans that place or
    # looks across it.
    end: re.Pattern


# gpt2    words with the space before them, runs of digits, runs of signs (GPT-2's encoder.py); also
#         the pattern of r50k and p50k.
# cl100k  that of GPT-4 and Llama 3: words take any one sign before them, digits fall into threes,
#         signs take the ends of lines.
# digits  the same with every digit a token (Qwen 2), so that numbers of one length look alike.
#
# A rule for cutting holds if no word spans it. GPT-2's words have spaces in front only. In the
# others signs take ends of lines too, while only spaces come before a line end's own word.
PATTERNS = {
    "gpt2": Pattern("", BEFORE_SPACE),
    "cl100k": Pattern(MODERN % r"\p{N}{1,3}", AT_LINES),
    "digits": Pattern(MODERN % r"\p{N}", AT_LINES),
}


def _cut(text: str, end: re.Pattern) -> Iterator[str]:
    """`text` in parts of at least vocabulary.PART characters, cut where `end` allows it."""
    start = 0
    size = vocabulary.PART
    while len(text) - start > size:
        place = end.search(text, start + size - 1)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:]


# ---- making ----


def make_pre_tokenizer(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """The library's pre-tokenizer for a row of PATTERNS."""
    kinds = tokenizers.pre_tokenizers
    regex = PATTERNS[pattern].regex
    if not regex:
        return kinds.ByteLevel(add_prefix_space=False)
    split = kinds.Split(tokenizers.Regex(regex), "isolated")
    return kinds.Sequence([split, kinds.ByteLevel(add_prefix_space=False, use_regex=False)])


def _make_library(model, pattern: str) -> tokenizers.Tokenizer:
    """The library's byte-level tokenizer around a model."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = make_pre_tokenizer(pattern)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def make_bpe_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pattern: str,
    specials: Iterable[str],
    ignore_merges: bool = False,
) -> str:
    """The text of a tokenizer.json: byte-level BPE of `vocab`, in which `specials` are special."""
    library = _make_library(tokenizers.models.BPE({}, []), pattern)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = _list_added({name: vocab[name] for name in specials})
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    return json.dumps(spec, ensure_ascii=False)


def _list_added(specials: Mapping[str, int]) -> list[dict]:
    """The entries of `added_tokens` for special tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": name, **flags, "special": True} for name, i in specials.items()]


def export_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that has all tokens of `tokenizer`, also those of `extra`.

    It is the file that was read if there are none of them. Raises UsageError if the library would
    give one another id, because ids before it have no token.
    """
    if not tokenizer.extra:
        return tokenizer.content
    spec = json.loads(tokenizer.content)
    added = sorted(_list_added(tokenizer.extra), key=lambda token: token["id"])
    spec["added_tokens"] = [*(spec.get("added_tokens") or []), *added]
    text = json.dumps(spec, ensure_ascii=False)
    _check_added(_load(text), spec, tokenizer.name)
    return text


def train_bpe(texts: Iterable[str], vocab: int, pattern: str = "gpt2") -> Tokenizer:
    """Trains byte-level BPE with the pre-tokenizer of a row of PATTERNS.

    The ids are `<|endoftext|>`, 256 bytes, then merges. There are at most `vocab`, and fewer when
    the text has no pair left that occurs twice.
    """
    library = _make_library(tokenizers.models.BPE(), pattern)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[EOT],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )

    end = PATTERNS[pattern].end
    library.train_from_iterator((part for text in texts for part in _cut(text, end)), trainer)

    name = f"bpe:{vocab}" if pattern == "gpt2" else f"bpe:{vocab}:{pattern}"
    return make_json_tokenizer(library.to_str(), name)


# ---- how a file treats text ----


def _find_end(steps: list[dict]) -> re.Pattern | None:
    """Where a text may be cut if a pre-tokenizer of these steps is that of a row of PATTERNS."""
    *splits, last = steps or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None

    # Both ways of writing a split leave every word whole.
    isolating = (("Isolated", False), ("Removed", True))
    if any((split.get("behavior"), split.get("invert")) not in isolating for split in splits):
        return None

    regexes = [(split.get("pattern") or {}).get("Regex") for split in splits]
    if last.get("use_regex", True):
        regexes.append("")
    return next((row.end for row in PATTERNS.values() if regexes == [row.regex]), None)


def _spans_space(token: dict) -> bool:
    """Whether an added token takes the space around it, or contains some."""
    return token["lstrip"] or token["rstrip"] or bool(re.search(r"\s", token["content"]))


def _choose_cutter(spec: dict) -> Callable[[str], Iterator[str]]:
    """What cuts a text into parts that are encoded one by one.

    Parts are exact only if no normaliser looks across a cut and no added token spans one. A
    tokenizer that cannot promise this gets the whole text as one part.
    """
    end = _find_end(list_steps(spec, "pre_tokenizer"))
    normalizer = spec.get("normalizer")
    ordinary = [token for token in spec.get("added_tokens") or [] if not token["special"]]

    looks_across = bool(normalizer) and normalizer["type"] != "NFC"
    if end is None or looks_across or any(map(_spans_space, ordinary)):
        return lambda text: iter((text,))
    return lambda text: _cut(text, end)


def _strips_space(step: dict) -> bool:
    """Whether a step of a decoder takes one space away at the beginning."""
    if step["type"] == "Strip":
        return step["content"] == " " and step["start"] > 0
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and step.get(
            "add_prefix_space", True
        )
    return False


def _find_prefix(spec: dict) -> bytes:
    """The space that Llama 2's kind of tokenizer puts in front and its decoder takes away."""
    return b" " if any(map(_strips_space, list_steps(spec, "decoder"))) else b""


def _keeps_text(step: dict) -> bool:
    """Whether a step of a pre-tokenizer neither adds nor removes anything."""
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", True)
    if step["type"] == "Split":
        return step["behavior"] != "Removed" or step["invert"]
    return step["type"] == "Digits"


def _is_lossless(spec: dict) -> bool:
    """Whether every text comes back: bytes all the way, nothing normalised, added or removed."""
    added = spec.get("added_tokens") or []
    if any(not token["special"] and (token["lstrip"] or token["rstrip"]) for token in added):
        return False
    steps = list_steps(spec, "pre_tokenizer")
    has_bytes = any(step["type"] == "ByteLevel" for step in steps)
    return not spec.get("normalizer") and has_bytes and all(map(_keeps_text, steps))


# ---- opening ----


def _find_end_name(spec: dict) -> str | None:
    """The token that ends a text, None without any.

    One that the file calls special comes before others. Gemma 3 has <eos>, and </s> as an ordinary
    token, which is a tag of HTML there.
    """
    added = spec.get("added_tokens") or []
    special = {token["content"] for token in added if token["special"]}.difference(CHAT_TOKENS)
    tokens = {token for token, _ in json_fields.list_ids(spec)}
    names = [end for end in EOT_NAMES if end in special] + [
        end for end in EOT_NAMES if end in tokens
    ]
    return names[0] if names else None


def _parse(content: str, name: str) -> tuple[dict, list[str]]:
    """A parsed file, and those of its tokens that are special here and ordinary in the file.

    A file may add end of text, or chat and fill-in-the-middle tokens, as ordinary ones. Qwen 2.5's
    does. They become special, so that no text makes them.
    """
    spec = json.loads(content)
    json_fields.check_fields(spec, name)
    added = spec.get("added_tokens") or []
    known = {token for tokens in SPECIALS.values() for token in tokens}
    end = _find_end_name(spec)
    ordinary = [
        token for token in added if token["content"] in {*known, end} and not token["special"]
    ]
    for token in ordinary:
        token["special"] = True
    return spec, [token["content"] for token in ordinary]


def _load(content: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, with what json_fields.list_notes names set aside."""
    library = tokenizers.Tokenizer.from_str(content)
    library.no_truncation()
    library.no_padding()
    library.post_processor = None
    if getattr(library.model, "dropout", None):
        library.model.dropout = None
    library.encode_special_tokens = True  # <|endoftext|> in a document is text, not the end of it
    return library


def _open(content: str, name: str) -> tuple[tokenizers.Tokenizer, dict, list[str]]:
    """The library's tokenizer, the parsed file, and the tokens that only here are special.

    Raises UsageError if the file is no tokenizer.json, or says what is not honoured.
    """
    try:
        spec, ordinary = _parse(content, name)
        library = _load(json.dumps(spec) if ordinary else content)
    except UsageError:
        raise
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UsageError(
            f"tokenizer {name}: not a tokenizer.json of the tokenizers library: {error}"
        ) from None

    _check_added(library, spec, name)
    return library, spec, ordinary


def _check_added(library: tokenizers.Tokenizer, spec: dict, name: str) -> None:
    """Raises UsageError if an added token has another id than the file says."""
    for token in spec.get("added_tokens") or []:
        actual = library.token_to_id(token["content"])
        if actual != token["id"]:
            raise UsageError(
                f"tokenizer {name}: the id of {token['content']!r} = {token['id']}: the library "
                f"gives it {actual}; mend the file"
            )


def _make_encoder(library: tokenizers.Tokenizer) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """The function that encodes a batch of texts on all threads of the library."""

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            text.encode()  # the library's own error for a lone surrogate names no place

        # The batch call releases the interpreter's lock, the single one does not. The fast one
        # leaves offsets out.
        encodings = library.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = []
        for encoding in encodings:
            ids = encoding.ids  # a new list at every access
            arrays.append(np.fromiter(ids, np.int32, len(ids)))
        return arrays

    return encode


def make_json_tokenizer(content: str, name: str = "tokenizer.json") -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json, encoded by the `tokenizers` library.

    It is not `lossless` if the file normalises text, such as by NFC or with spaces as ▁. Raises
    UsageError if the file has no end-of-text token or would drop text.
    """
    library, spec, ordinary = _open(content, name)
    vocab = library.get_vocab(with_added_tokens=True)
    end = _find_end_name(spec)
    if end is None:
        names = " ".join(EOT_NAMES)
        raise UsageError(f"tokenizer {name}: has no end-of-text token; add one of {names}")

    added = library.get_added_tokens_decoder()
    specials = {end: vocab[end]}
    for i, token in sorted(added.items()):
        if token.special:
            specials[token.content] = i

    tokenizer = Tokenizer(
        "json",
        name,
        content,
        spell_pieces(spec, name, vocab, added, set(specials.values())),
        vocab[end],
        _make_encoder(library),
        _choose_cutter(spec),
        specials,
        prefix=_find_prefix(spec),
        lossless=_is_lossless(spec),
    )
    spelt = {*json_fields.find_spelt(spec, specials), *find_made(tokenizer, specials)}
    if spelt:
        without = json_fields.hide(spec, spelt)
        library = _load(json.dumps(without))
        _check_added(library, without, name)
        tokenizer = replace(tokenizer, encoder=_make_encoder(library))
    notes = json_fields.list_notes(spec, spelt.union(ordinary))
    return check_promises(replace(tokenizer, notes=notes))


def find_begin(tokenizer: Tokenizer) -> int | None:
    """The special token that a tokenizer.json puts before a text for a finished model, or None.

    Raises UsageError if it puts more than that there, or anything behind the text.
    """
    library = tokenizers.Tokenizer.from_str(tokenizer.content)
    plain = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    if full == plain:
        return None
    if full[1:] != plain or full[0] not in tokenizer.specials.values():
        raise UsageError(
            f"tokenizer {tokenizer.name}: its post_processor adds more than one token before a "
            "text; leave out of the file what the model does not need"
        )
    return full[0]
