"""Conversations as text: turns between special tokens, of which the assistant's are learned.

Without a template, turns are written in ChatML, with the tokens that `+chat` adds to a tokenizer. A
chat template of Hugging Face writes the turns of a model that was converted.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpt_jax.data.tasks.conversations import ASSISTANT, SYSTEM, Turn, read_turns
from gpt_jax.data.tasks.example import Example, Span, make_example
from gpt_jax.data.tasks.options import Pairs
from gpt_jax.data.tasks.template import Render, render_chats
from gpt_jax.data.tokenizers.vocabulary import CHAT_TOKENS
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error

CHATML = "chatml"
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
LARGEST_TEMPLATE = 1 << 20  # characters; published ones have some thousands


@dataclass(frozen=True)
class Chat:
    """How conversations are written."""

    # A system prompt for the conversations without one.
    system: str = ""

    # chatml, or a chat template of Hugging Face: a .jinja file, a tokenizer_config.json, or a
    # folder with one of them. Empty: that of the tokenizer's folder, or chatml if it has none.
    template: str = ""

    # Special tokens by what the template calls them. The tokenizer gives them.
    tokens: Pairs = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """None is needed in all shapes of conversations."""
        return ()


def read_chat(row: dict, options: Chat) -> Example:
    """The conversation of a row. What the assistant says is learned, and the token that ends it."""
    turns = read_turns(row)
    if options.system and turns[0].role != SYSTEM:
        turns = [Turn(SYSTEM, options.system), *turns]
    if options.template in ("", CHATML):
        return make_example(write_chatml(turns))
    return make_example(write_by_template(turns, options))


def write_chatml(turns: Sequence[Turn]) -> list[Span]:
    """The spans of turns in ChatML."""
    start, end = CHAT_TOKENS
    spans = []
    for i, (role, content) in enumerate(turns):
        learn = role == ASSISTANT
        spans += [
            Span("\n" if i else "", learn=False),
            Span(start, learn=False, special=True),
            Span(f"{role}\n", learn=False),
            Span(content, learn),
            Span(end, learn, special=True),
        ]
    return spans


# ---- templates of Hugging Face ----


def write_by_template(turns: Sequence[Turn], options: Chat) -> list[Span]:
    """The spans of turns as a template writes them.

    An answer begins where the generation prompt ends. Raises ValueError for a template that fails,
    or that writes earlier turns otherwise once later ones follow, and for a turn that names a
    special token, because nobody could tell it from the template's own.
    """
    names = [text for _, text in options.tokens]
    for i, turn in enumerate(turns, 1):
        held = next((name for name in names if name in turn.content), None)
        if held:
            raise ValueError(f"turn {i} holds the name of the special token {held}; take it out")

    messages = tuple(turn._asdict() for turn in turns)
    places = [i for i, turn in enumerate(turns) if turn.role == ASSISTANT]
    renders = [Render(messages, False)]
    for i in places:
        renders += [Render(messages[:i], True), Render(messages[: i + 1], False)]
    whole, *parts = render_chats(options.template, options.tokens, renders)

    spans = []
    done = 0
    for before, after in zip(parts[::2], parts[1::2], strict=True):
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(
                "the chat template writes earlier turns otherwise once later ones follow, so "
                "nobody can tell what is learned; give another template"
            )
        spans += split_specials(whole[done : len(before)], names, learn=False)
        spans += learn_to_end(split_specials(after[len(before) :], names, learn=True))
        done = len(after)
    return spans + split_specials(whole[done:], names, learn=False)


def learn_to_end(spans: list[Span]) -> list[Span]:
    """The same spans. What follows the last special token is not learned, such as a new line."""
    last = max((i for i, span in enumerate(spans) if span.special), default=len(spans) - 1)
    return [span._replace(learn=i <= last) for i, span in enumerate(spans)]


def split_specials(text: str, names: Sequence[str], learn: bool) -> list[Span]:
    """The spans of a text in which each of `names` is a special token."""
    if not names:
        return [Span(text, learn)]
    # Of names that begin alike the longest is meant.
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return [
        Span(part, learn, special=i % 2 == 1)
        for i, part in enumerate(re.split(f"({pattern})", text))
    ]


# ---- where a template comes from ----


def complete_chat(options: Chat, folder: str, specials: Collection[str], field: str) -> Chat:
    """The options with the text of their template, and with the tokenizer's special tokens.

    `folder` is where the tokenizer lies, if it lies in files. Raises UsageError, which names
    `field`, for a template that cannot be read.
    """
    asked = options.template or folder
    if options.template == CHATML or not asked:
        return replace(options, template=CHATML)
    path = find_template(Path(asked).expanduser(), is_asked=bool(options.template), field=field)
    if path is None:
        return replace(options, template=CHATML)

    text, named = read_template(path, field)
    if not text:
        if options.template:
            raise UsageError(f"{field} template={options.template}: holds no chat_template")
        return replace(options, template=CHATML)
    unknown = [key for key, token in named.items() if key in text and token not in specials]
    if unknown:
        raise UsageError(
            f"{field} template={path}: writes {unknown[0]}, which is {named[unknown[0]]!r} in "
            "tokenizer_config.json, and the tokenizer has no such special token; give the one that "
            "belongs to it, or template=chatml"
        )
    used = {key: token for key, token in named.items() if token in specials}
    # An empty name would be found everywhere.
    others = {f"token {name}": name for name in specials if name and name not in used.values()}
    return replace(options, template=text, tokens=tuple({**used, **others}.items()))


def find_template(place: Path, is_asked: bool, field: str) -> Path | None:
    """The file of a template: `place`, or the first of TEMPLATE_FILES in that folder or beside it.

    Raises UsageError if the user asked for it and it is not there.
    """
    if is_asked and place.is_file():
        return place
    folder = place if place.is_dir() else place.parent
    beside = [folder / name for name in TEMPLATE_FILES if (folder / name).is_file()]
    if is_asked and not (place.is_dir() and beside):
        raise UsageError(
            f"{field} template={place}: expected {CHATML}, a .jinja file, or a folder with "
            f"{' or '.join(TEMPLATE_FILES)}"
        )
    return beside[0] if beside else None


def read_template(path: Path, field: str) -> tuple[str, dict[str, str]]:
    """(the text of a template or "", {bos_token: its name, …}). Raises UsageError."""
    settings = {}
    beside = path.with_name("tokenizer_config.json")
    try:
        if beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8") if path != beside else ""
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{field} template={path}: cannot be read: {describe_error(error)}"
        ) from None
    if not isinstance(settings, dict):
        settings = {}
    text = text or pick_default(settings.get("chat_template"))
    if len(text) > LARGEST_TEMPLATE:
        raise UsageError(
            f"{field} template={path}: has {len(text):,} characters, expected at most "
            f"{LARGEST_TEMPLATE:,}"
        )
    named = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        # An older version wrote an object with the flags of the token.
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str) and token:
            named[key] = token
    return text, named


def pick_default(template: object) -> str:
    """The text of `chat_template`. Of several by name it is the one called default."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if entry}
        template = named.get("default")
    return template if isinstance(template, str) else ""
