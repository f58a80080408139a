"""The fields of a tokenizer.json: which are known, what they may say, and which are set aside.

A field that changes ids or text is honoured, or refused by its name. Fields that are for the use of
a finished model, such as truncation, are set aside, and a note says so.
"""

from collections.abc import Collection, Iterator
from typing import Any

from gpt_jax.errors import UsageError

TOP = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
# The fields of each type of model. Others, such as WordPiece, drop text that they do not know.
MODELS = {
    "BPE": {
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
        "vocab",
        "merges",
    },
    "Unigram": {"unk_id", "vocab", "byte_fallback"},
}
# Such a prefix or suffix is no text, and every token would have to be spelt without it.
MUST_BE_EMPTY = ("continuing_subword_prefix", "end_of_word_suffix")

BYTE_LEVEL = {"add_prefix_space", "trim_offsets", "use_regex"}
METASPACE = {"replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"}
# The fields of the steps of each part. The library carries out those of the first two.
STEPS = {
    "normalizer": {
        "NFC": set(),
        "NFD": set(),
        "NFKC": set(),
        "NFKD": set(),
        "Nmt": set(),
        "Lowercase": set(),
        "StripAccents": set(),
        "ByteLevel": set(),
        "Strip": {"strip_left", "strip_right"},
        "Replace": {"pattern", "content"},
        "Prepend": {"prepend"},
        "Precompiled": {"precompiled_charsmap"},
        "BertNormalizer": {"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"},
    },
    "pre_tokenizer": {
        "ByteLevel": BYTE_LEVEL,
        "Metaspace": METASPACE,
        "Split": {"pattern", "behavior", "invert"},
        "Digits": {"individual_digits"},
        "Punctuation": {"behavior"},
        "CharDelimiterSplit": {"delimiter"},
        "FixedLength": {"length"},
        "Whitespace": set(),
        "WhitespaceSplit": set(),
        "UnicodeScripts": set(),
        "BertPreTokenizer": set(),
    },
    "decoder": {
        "ByteLevel": BYTE_LEVEL,
        "Metaspace": METASPACE,
        "ByteFallback": set(),
        "Fuse": set(),
        "Replace": {"pattern", "content"},
        "Strip": {"content", "start", "stop"},
    },
}
INSIDE = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
# Tokens are decoded one by one here, without the library, so a decoder may only say this.
DECODERS = {
    "Metaspace": {"replacement": ("▁",)},
    "Replace": {"pattern": ({"String": "▁"},), "content": (" ",)},
    "Strip": {"content": (" ",), "start": (0, 1), "stop": (0,)},
}

# Files leave some ids free, cl100k_base 16 of 100,277. Far larger ids are a mistake, and the tables
# by id would take gigabytes.
FREE_IDS = 1024
SHOWN = 5  # special tokens that a line names


def list_steps(spec: dict, part: str) -> list[dict]:
    """The steps of one part of a tokenizer.json. A part is a sequence, one step, or missing."""
    value = spec.get(part)
    return value.get(INSIDE[part], [value]) if value else []


# ---- checks ----


def check_fields(spec: dict, name: str) -> None:
    """Raises UsageError, naming the field, if a file says something that is not honoured."""
    _check_names(spec, TOP, name, "")
    for token in spec.get("added_tokens") or []:
        _check_names(token, ADDED, name, "added_tokens.")
    for part, kinds in STEPS.items():
        _check_steps(list_steps(spec, part), part, kinds, name)
    _check_decoder(list_steps(spec, "decoder"), name)
    if spec.get("model"):
        _check_model(spec["model"], name)
        _check_ids(spec, name)


def _refuse(name: str, field: str, value: Any, why: str) -> UsageError:
    said = repr(value)
    said = said if len(said) < 60 else f"{said[:60]}…"
    return UsageError(f"tokenizer {name}: {field} = {said}: {why}")


def _check_names(table: dict, known: Collection[str], name: str, place: str) -> None:
    for field in table:
        if field not in known:
            why = "an unknown field, which may change ids; take it out if it does not"
            raise _refuse(name, f"{place}{field}", table[field], why)


def _check_steps(steps: list[dict], part: str, kinds: dict, name: str) -> None:
    for step in steps:
        kind = step["type"]
        if kind not in kinds:
            why = f"not among the known steps ({', '.join(kinds)}); use a tokenizer without it"
            raise _refuse(name, f"{part}.type", kind, why)
        _check_names(step, {"type", *kinds[kind]}, name, f"{part}.{kind}.")


def _check_decoder(steps: list[dict], name: str) -> None:
    fused = False
    for step in steps:
        kind = step["type"]
        fused |= kind in ("Fuse", "Metaspace")
        for field, allowed in DECODERS.get(kind, {}).items():
            if step.get(field) not in allowed:
                why = f"known is {' or '.join(map(repr, allowed))}; use a tokenizer with that"
                raise _refuse(name, f"decoder.{kind}.{field}", step.get(field), why)
        if kind == "Strip" and not fused:
            why = "it takes a space from every token unless Fuse comes before it; mend the file"
            raise _refuse(name, "decoder.type", kind, why)


def find_model_type(model: dict) -> str:
    """The type of a model. Old files do not name it, and only BPE has merges."""
    return model.get("type") or ("BPE" if "merges" in model else "Unigram")


def _check_model(model: dict, name: str) -> None:
    kind = find_model_type(model)
    if kind not in MODELS:
        why = f"drops text that it does not know; use one of {', '.join(MODELS)}"
        raise _refuse(name, "model.type", kind, why)

    _check_names(model, {"type", *MODELS[kind]}, name, "model.")
    for field in MUST_BE_EMPTY:
        if model.get(field):
            why = "would stand in the text that tokens are decoded to; use a tokenizer without it"
            raise _refuse(name, f"model.{field}", model[field], why)


def list_ids(spec: dict) -> Iterator[tuple[str, int]]:
    """(token, id) of the model and of the added tokens. Of Unigram the place is the id."""
    vocab = spec["model"].get("vocab") or {}
    if isinstance(vocab, dict):
        yield from vocab.items()
    else:
        yield from ((piece, i) for i, (piece, _) in enumerate(vocab))
    for token in spec.get("added_tokens") or []:
        yield token["content"], token["id"]


def _check_ids(spec: dict, name: str) -> None:
    """Raises UsageError for an id far beyond the others, and for one id of two tokens."""
    tokens: dict[int, str] = {}
    for token, i in list_ids(spec):
        if tokens.setdefault(i, token) != token:
            why = f"{tokens[i]!r} has the same id; give each token its own"
            raise _refuse(name, f"the id of {token!r}", i, why)

    limit = 2 * len(tokens) + FREE_IDS
    if max(tokens, default=0) >= limit:
        largest = max(tokens)
        why = (
            f"the file has {len(tokens):,} tokens, and an id must be below {limit:,}; "
            "give the tokens ids without large gaps"
        )
        raise _refuse(name, f"the id of {tokens[largest]!r}", largest, why)


# ---- what is set aside ----


def describe_hidden(names: Collection[str]) -> tuple[str, ...]:
    """A line about special tokens that a file would make of plain text; none without any."""
    if not names:
        return ()
    shown = ", ".join(sorted(names)[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"its file makes special tokens of the plain text {shown}{more}; here such text is encoded "
        "as ordinary characters",
    )


def list_notes(spec: dict, hidden: Collection[str]) -> tuple[str, ...]:
    """Lines about what a file says and what is done otherwise. There are none for most files.

    `hidden` are special tokens that the file would make of plain text.
    """
    notes = [*describe_hidden(hidden)]
    if spec["model"].get("dropout"):
        notes.append(
            f"its model.dropout = {spec['model']['dropout']} is not applied, so that a text always "
            "has the same ids"
        )
    for field in ("truncation", "padding"):
        if spec.get(field):
            notes.append(f"its {field} is not applied, because documents are encoded whole")
    if _adds_tokens(spec.get("post_processor")):
        notes.append(
            "its post_processor is not applied: no special token is put around a text, and end of "
            "text ends each document"
        )
    return tuple(notes)


def _adds_tokens(processor: dict | None) -> bool:
    """Whether a post-processor does more than to move offsets."""
    if not processor:
        return False
    return any(step["type"] != "ByteLevel" for step in processor.get("processors", [processor]))


# ---- special tokens that the model could spell ----

# It goes in front of such a token inside the library's model. It is no character of any text, and
# byte-level text never contains it.
MARK = "\U0010ffff"


def _split_merge(merge: str | list[str]) -> tuple[str, str]:
    """The two parts of a merge, which old files write with a space between them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def find_spelt(spec: dict, names: Collection[str]) -> set[str]:
    """Those of `names` that the model can make of ordinary pieces of text."""
    model = spec["model"]
    if find_model_type(model) == "Unigram":
        return {piece for piece, _ in model["vocab"]} & set(names)
    return {first + second for first, second in map(_split_merge, model["merges"])} & set(names)


def hide(spec: dict, names: Collection[str]) -> dict:
    """A tokenizer.json whose model has no text for `names`, with the ids of all others.

    Merges that lead to such a token, or go on from it, are left out.
    """
    model = dict(spec["model"])

    def rename(token: str) -> str:
        return f"{MARK}{token}" if token in names else token

    if find_model_type(model) == "Unigram":
        inside = {piece for piece, _ in model["vocab"]} & set(names)
        model["vocab"] = [[rename(piece), score] for piece, score in model["vocab"]]
    else:
        inside = set(names) & model["vocab"].keys()
        pairs = map(_split_merge, model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not inside.intersection((a, b, a + b))]
        model["vocab"] = {rename(token): i for token, i in model["vocab"].items()}
        if model.get("unk_token"):
            model["unk_token"] = rename(model["unk_token"])

    added = [token for token in spec.get("added_tokens") or [] if token["content"] not in inside]
    return spec | {"model": model, "added_tokens": added}
