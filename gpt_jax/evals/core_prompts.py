"""The prompts of CORE's questions, and which of their tokens are scored.

The rules are those of nanochat's `core_eval.py`, because its figures are the ones that people
compare. The texts are those of llm-foundry, which draws other examples.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.evals.core_tasks import CHOICE, LANGUAGE, SCHEMA, CoreTask
from gpt_jax.infer import Request

Row = dict[str, Any]
Ids = Sequence[int] | np.ndarray  # [tokens]

# The rows of a file are shuffled with this seed. Examples are drawn with a seed for each row.
SHUFFLE_SEED = 1337
EXAMPLE_SEED = 1234


class Prompt(NamedTuple):
    """The texts of one question, a whole text for each option.

    `stem` is the part before the continuation if there is one option alone.
    """

    options: list[str]
    stem: str


class CoreKind(NamedTuple):
    """A kind of task.

    `check(row)` says what is wrong with a row, or "". `render(row, delimiter)` gives its options,
    and `show_right(row, delimiter)` the text of the right one, for an example. The options differ
    in `name_options(row)`, and share the column `shared`. `find_starts(options, stem)` says where
    the continuation of each begins.
    """

    columns: tuple[str, ...]
    check: Callable[[Row], str]
    render: Callable[[Row, str], list[str]]
    show_right: Callable[[Row, str], str]
    shared: str
    name_options: Callable[[Row], list[str]]
    find_starts: Callable[[Sequence[Ids], Ids], list[int]]


# ---- rows ----


def _check_text(row: Row, name: str) -> str:
    return "" if isinstance(row[name], str) else f"{name}: expected a text"


def _check_options(row: Row, name: str, text: str) -> str:
    options, gold = row[name], row["gold"]
    is_list = isinstance(options, list) and len(options) > 1
    if not is_list or not all(isinstance(option, str) for option in options):
        return f"{name}: expected a list of two texts or more"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        return f"gold = {gold!r}: expected 0 to {len(options) - 1}, the place of the right one"
    return _check_text(row, text)


def _check_choice(row: Row) -> str:
    return _check_options(row, "choices", "query")


def _check_schema(row: Row) -> str:
    return _check_options(row, "context_options", "continuation")


def _check_language(row: Row) -> str:
    wrong = _check_text(row, "context") or _check_text(row, "continuation")
    return wrong or ("" if row["continuation"].strip() else "continuation: is empty")


# ---- texts ----


def _render_choice(row: Row, delimiter: str) -> list[str]:
    return [row["query"] + delimiter + choice for choice in row["choices"]]


def _render_schema(row: Row, delimiter: str) -> list[str]:
    return [context + delimiter + row["continuation"] for context in row["context_options"]]


def _render_language(row: Row, delimiter: str) -> list[str]:
    return [row["context"].strip() + delimiter + row["continuation"]]


def _show_language(row: Row, delimiter: str) -> str:
    return _render_language(row, delimiter)[0]


# ---- where continuations begin ----


def count_common(options: Sequence[Ids]) -> int:
    """How many first ids all of `options` share. One of each is left to be scored."""
    most = min(map(len, options)) - 1
    first = np.asarray(options[0][:most])
    same = np.ones(most, bool)
    for other in options[1:]:
        same &= first == np.asarray(other[:most])
    return most if same.all() else int(same.argmin())


def _start_at_difference(options: Sequence[Ids], stem: Ids) -> list[int]:
    """Choices are scored from the first token that they do not share."""
    return [count_common(options)] * len(options)


def _start_at_likeness(options: Sequence[Ids], stem: Ids) -> list[int]:
    """Contexts are scored by the last tokens that they share: those of the continuation."""
    shared = max(1, count_common([ids[::-1] for ids in options]))
    return [len(ids) - shared for ids in options]


def _start_after_stem(options: Sequence[Ids], stem: Ids) -> list[int]:
    return [min(len(stem), len(options[0]) - 1)]


CORE_KINDS = {
    CHOICE: CoreKind(
        ("query", "choices", "gold"),
        _check_choice,
        _render_choice,
        lambda row, delimiter: _render_choice(row, delimiter)[row["gold"]],
        "query",
        lambda row: row["choices"],
        _start_at_difference,
    ),
    SCHEMA: CoreKind(
        ("context_options", "continuation", "gold"),
        _check_schema,
        _render_schema,
        lambda row, delimiter: _render_schema(row, delimiter)[row["gold"]],
        "continuation",
        lambda row: row["context_options"],
        _start_at_likeness,
    ),
    LANGUAGE: CoreKind(
        ("context", "continuation"),
        _check_language,
        _render_language,
        _show_language,
        "context",
        lambda row: [row["continuation"]],
        _start_after_stem,
    ),
}


# ---- prompts ----


def shuffle_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows in the order in which they are numbered from here on."""
    shuffled = list(rows)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled


def draw_examples(number: int, count: int, shots: int) -> list[int]:
    """The numbers of `shots` of `count` rows to show before the row `number`, itself not among.

    The draw depends on the number and not on the model, so that all models read the same.
    """
    if not shots:
        return []
    # `sample` picks places, so that places from `number` on stand for the next row.
    places = random.Random(EXAMPLE_SEED + number).sample(range(count - 1), shots)
    return [place + (place >= number) for place in places]


def make_prompt(task: CoreTask, rows: Sequence[Row], number: int) -> Prompt:
    """The texts of the shuffled row `number`: its examples, then itself."""
    kind = CORE_KINDS[task.kind]
    before = ""
    for example in draw_examples(number, len(rows), task.shots):
        before += kind.show_right(rows[example], task.delimiter) + "\n\n"
    options = [before + text for text in kind.render(rows[number], task.delimiter)]
    stem = ""
    if len(options) == 1:
        # A space before the continuation belongs to its first token.
        stem = options[0].removesuffix(rows[number]["continuation"]).rstrip()
    return Prompt(options, stem)


def make_requests(
    tokenizer: Tokenizer, task: CoreTask, prompts: Sequence[Prompt]
) -> list[list[Request]]:
    """The requests of each prompt, one for each of its options.

    Each text begins with the start token, as documents do in training. A tokenizer that has none
    goes without. Raises UsageError as the tokenizer does.
    """
    start = tokenizer.eot if tokenizer.begin is None else tokenizer.begin
    head = [] if start is None else [start]
    texts = [text for prompt in prompts for text in prompt.options]
    encoded = iter(_encode(tokenizer, texts, head))
    stems = _encode(tokenizer, [prompt.stem for prompt in prompts], head)
    find_starts = CORE_KINDS[task.kind].find_starts

    requests = []
    for prompt, stem in zip(prompts, stems, strict=True):
        options = [next(encoded) for _ in prompt.options]
        starts = find_starts(options, stem)
        requests.append(
            [Request(ids[:at], ids[at:]) for ids, at in zip(options, starts, strict=True)]
        )
    return requests


def _encode(tokenizer: Tokenizer, texts: Sequence[str], head: list[int]) -> list[np.ndarray]:
    return [
        np.concatenate([head, ids]).astype(np.int32) for ids in tokenizer.encode_batch(list(texts))
    ]
