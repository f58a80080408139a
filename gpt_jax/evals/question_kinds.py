"""Kinds of questions: the columns that each must have, and how it is asked and judged.

A choice or answer follows its context as it stands, so it begins with a space where a space belongs
there. A row may have a `separator`, which comes between where no white space does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.evals.results import Shown, show
from gpt_jax.infer import Score

Pair = tuple[str, str]  # a context and its continuation
Row = dict[str, Any]

COMPARISONS = ("acc", "acc_norm_token", "acc_norm_byte", "acc_norm_unconditional")


class Kind(NamedTuple):
    """A kind of question.

    `check(row)` says what is wrong with a row, or "". `ask(row)` gives pairs of texts. `judge(row,
    scores)` tells by each of `metrics` whether the row is right, from the scores of those pairs.
    `show(row, scores)` puts the same into words. A kind with `settings(row)` lets the model write,
    and has texts in place of scores.
    """

    columns: tuple[str, ...]
    check: Callable[[Row], str]
    ask: Callable[[Row], list[Pair]]
    metrics: tuple[str, ...]
    judge: Callable[[Row, Sequence[Any]], list[bool]]
    show: Callable[[Row, Sequence[Any]], Shown]
    settings: Callable[[Row], dict[str, Any]] | None = None


def _find_totals(scores: Sequence[Score]) -> list[float]:
    return [score.total for score in scores]


def _follow(row: Row, context: str, text: str) -> str:
    """`text` with the row's separator in front, unless `context` ends with white space."""
    separator = row.get("separator", "")
    return text if context[-1:].isspace() else separator + text


def _check_gold(name: str, options: Sequence[str], gold: Any) -> str:
    is_list = isinstance(options, list) and len(options) > 1
    if not is_list or not all(isinstance(option, str) and option.strip() for option in options):
        return f"{name}: expected a list of two texts or more, none of them empty"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        return f"gold = {gold!r}: expected 0 to {len(options) - 1}, the place of the right choice"
    return ""


# ---- multiple choice ----


def _check_choices(row: Row) -> str:
    if not isinstance(row["context"], str):
        return "context: expected a text"
    wrong = _check_gold("choices", row["choices"], row["gold"])
    if not wrong and not isinstance(row.get("unconditional", ""), str):
        return "unconditional: expected a text"
    return wrong


def _ask_choices(row: Row) -> list[Pair]:
    """Each choice after its context, and then each after the context `unconditional`."""
    contexts = (row["context"], row.get("unconditional", ""))
    return [
        (context, _follow(row, context, choice))
        for context in contexts
        for choice in row["choices"]
    ]


def _judge_choices(row: Row, scores: Sequence[Score]) -> list[bool]:
    """Whether the best choice is the right one, by each of COMPARISONS.

    The bytes are those of a choice without the white space around it, as in
    lm-evaluation-harness.
    """
    count = len(row["choices"])
    totals = np.array(_find_totals(scores))
    tokens = np.array([len(score.logprobs) for score in scores[:count]])
    sizes = np.array([len(choice.strip().encode()) for choice in row["choices"]])
    given = totals[:count]
    ranked = (given, given / tokens, given / sizes, given - totals[count:])
    return [int(values.argmax()) == row["gold"] for values in ranked]


def _show_choices(row: Row, scores: Sequence[Score]) -> Shown:
    choices = row["choices"]
    return show(row["context"], choices, row["gold"], _find_totals(scores)[: len(choices)])


# ---- schemas: one continuation after several contexts ----


def _check_contexts(row: Row) -> str:
    if not isinstance(row["continuation"], str) or not row["continuation"].strip():
        return "continuation: expected a text, not empty"
    return _check_gold("context_options", row["context_options"], row["gold"])


def _ask_contexts(row: Row) -> list[Pair]:
    text = row["continuation"]
    return [(context, _follow(row, context, text)) for context in row["context_options"]]


def _judge_contexts(row: Row, scores: Sequence[Score]) -> list[bool]:
    return [int(np.argmax(_find_totals(scores))) == row["gold"]]


def _show_contexts(row: Row, scores: Sequence[Score]) -> Shown:
    return show(row["continuation"], row["context_options"], row["gold"], _find_totals(scores))


# ---- exact match ----


def _check_answer(row: Row) -> str:
    if not isinstance(row["context"], str):
        return "context: expected a text"
    answer = row["answer"]
    return "" if isinstance(answer, str) and answer else "answer: expected a text, not empty"


def _ask_answer(row: Row) -> list[Pair]:
    return [(row["context"], _follow(row, row["context"], row["answer"]))]


def _judge_answer(row: Row, scores: Sequence[Score]) -> list[bool]:
    """Whether the model, taking the most likely token each time, would write the answer."""
    return [scores[0].is_greedy]


def _show_answer(row: Row, scores: Sequence[Score]) -> Shown:
    return show(row["context"], [row["answer"]], 0, _find_totals(scores))


CHOICES = Kind(
    ("context", "choices", "gold"),
    _check_choices,
    _ask_choices,
    COMPARISONS,
    _judge_choices,
    _show_choices,
)
CONTEXTS = Kind(
    ("context_options", "continuation", "gold"),
    _check_contexts,
    _ask_contexts,
    ("acc",),
    _judge_contexts,
    _show_contexts,
)
MATCH = Kind(
    ("context", "answer"), _check_answer, _ask_answer, ("exact_match",), _judge_answer, _show_answer
)
