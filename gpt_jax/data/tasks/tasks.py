"""Tasks: pure functions that make an Example of a row.

A task is a row of TASKS. Its function `(row, options) -> Example` gets a JSON object, and options
of its own dataclass. It raises ValueError for a row that it cannot read.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from gpt_jax.data.tasks.chat import CHATML, Chat, complete_chat, read_chat
from gpt_jax.data.tasks.classify import Classify, read_classified
from gpt_jax.data.tasks.columns import get
from gpt_jax.data.tasks.example import Example, Span, make_example
from gpt_jax.data.tasks.options import Pairs, parse_options
from gpt_jax.data.tasks.translate import Translate, read_translated
from gpt_jax.data.tokenizers.vocabulary import CHAT_TOKENS


@dataclass(frozen=True)
class Plain:
    """The options of a task without options but `--field`."""

    field: str = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.field,)


@dataclass(frozen=True)
class Spans:
    """The options of a task that has none."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("spans",)


@dataclass(frozen=True)
class Supervised:
    """The options of a task that has none."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prompt", "response")


def name_field(field: str) -> str:
    """What messages call the field of a text."""
    return f"config.data.field = {field!r} (--field of prepare)"


def plain(row: dict, options: Plain) -> Example:
    """The text of one field, learned whole."""
    return Example((Span(get(row, options.field, str, name_field(options.field))),))


def spans(row: dict, options: Spans) -> Example:
    """`{"spans": [{"text": …, "learn": false}, …]}`, where `learn` is true if it is missing."""
    parts = []
    for i, part in enumerate(get(row, "spans", list, "the field 'spans' of --task=spans")):
        where = f"spans[{i}]"
        if not isinstance(part, dict):
            raise ValueError(f"{where} is {type(part).__name__}, expected an object")
        text = get(part, "text", str, f"{where}.text")
        learn = get({"learn": True} | part, "learn", bool, f"{where}.learn")
        parts.append(Span(text, learn))
    return make_example(parts)


def supervised(row: dict, options: Supervised) -> Example:
    """`{"prompt": …, "response": …}`, of which the response is learned."""
    prompt = get(row, "prompt", str, "the field 'prompt' of --task=supervised")
    response = get(row, "response", str, "the field 'response' of --task=supervised")
    return make_example([Span(prompt, learn=False), Span(response)])


class Task(NamedTuple):
    """A row of TASKS.

    `options` is a frozen dataclass with a property `columns`, which are the columns of a table that
    every row needs. `reads_turns` says whether text files of dialogues can be read.
    """

    read: Callable[[dict, Any], Example]
    options: type
    reads_turns: bool = False


TASKS: dict[str, Task] = {
    "plain": Task(plain, Plain),
    "spans": Task(spans, Spans),
    "supervised": Task(supervised, Supervised),
    "chat": Task(read_chat, Chat, reads_turns=True),
    "classify": Task(read_classified, Classify),
    "translate": Task(read_translated, Translate),
}


class TaskNote(NamedTuple):
    """The task of a corpus, as its manifest and the checkpoints trained on it have it."""

    task: str
    options: Pairs

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "options": dict(self.options)}


@functools.lru_cache(8)
def read_options(task: str, given: Pairs, field: str = "text") -> Any:
    """The options of a task. `field` is that of --field. Raises ValueError, which names one."""
    kind = TASKS[task].options
    has_field = any(spec.name == "field" for spec in fields(kind))
    return parse_options(kind, given, **({"field": field} if has_field else {}))


def list_specials(task: str, given: Pairs) -> tuple[str, ...]:
    """The special tokens without which a task cannot be written."""
    options = read_options(task, given)
    is_chatml = isinstance(options, Chat) and options.template in ("", CHATML)
    return CHAT_TOKENS if is_chatml else ()


def complete_options(task: str, given: Pairs, folder: str, specials, field: str) -> Pairs:
    """The options with what the tokenizer's files say, as pairs again.

    `folder` is where the tokenizer lies, or "". Raises UsageError, which names `field`.
    """
    options = read_options(task, given)
    if not isinstance(options, Chat):
        return given
    completed = complete_chat(options, folder, specials, field)
    pairs = {"system": completed.system, "template": completed.template}
    if completed.tokens:
        pairs["tokens"] = json.dumps(dict(completed.tokens))
    return tuple((name, text) for name, text in pairs.items() if text)
