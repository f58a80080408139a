"""Questions of a local .jsonl file, answered by the scores of their answers.

A row of multiple choice has `context`, `choices` and `gold`, the place of the right one. A row of
exact match has `context` and `answer`. A choice or answer follows its context as it stands, so it
begins with a space where a space belongs there.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.errors import UsageError
from gpt_jax.evals.subject import Subject
from gpt_jax.files import describe_error
from gpt_jax.infer import (
    Request,
    Score,
    carry_on,
    encode_pairs,
    fit_request,
    is_too_long,
    score_requests,
)

Pair = tuple[str, str]  # a context and its continuation
Row = dict[str, Any]
Say = Callable[[str], None]


class Kind(NamedTuple):
    """A kind of question: the columns that it must have, and how it is asked and judged.

    `check(row)` says what is wrong with a row, or "". `ask(row)` gives pairs of texts. `judge(row,
    scores)` tells by each of `metrics` whether the row is right, from the scores of those pairs.
    """

    columns: tuple[str, ...]
    check: Callable[[Row], str]
    ask: Callable[[Row], list[Pair]]
    metrics: tuple[str, ...]
    judge: Callable[[Row, Sequence[Score]], list[bool]]


# ---- multiple choice ----


def _check_choices(row: Row) -> str:
    choices, gold = row["choices"], row["gold"]
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "choices: expected a list of two texts or more, none of them empty"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold = {gold!r}: expected 0 to {len(choices) - 1}, the place of the right choice"
    if not isinstance(row.get("unconditional", ""), str):
        return "unconditional: expected a text"
    return ""


def _ask_choices(row: Row) -> list[Pair]:
    """Each choice after its context, and then each after the context `unconditional`."""
    contexts = (row["context"], row.get("unconditional", ""))
    return [(context, choice) for context in contexts for choice in row["choices"]]


COMPARISONS = ("acc", "acc_norm_token", "acc_norm_byte", "acc_norm_unconditional")


def _judge_choices(row: Row, scores: Sequence[Score]) -> list[bool]:
    """Whether the best choice is the right one, by each of COMPARISONS.

    The bytes are those of a choice without the white space around it, as in
    lm-evaluation-harness.
    """
    count = len(row["choices"])
    totals = np.array([score.total for score in scores])
    tokens = np.array([len(score.logprobs) for score in scores[:count]])
    sizes = np.array([len(choice.strip().encode()) for choice in row["choices"]])
    given = totals[:count]
    ranked = (given, given / tokens, given / sizes, given - totals[count:])
    return [int(values.argmax()) == row["gold"] for values in ranked]


# ---- exact match ----


def _check_answer(row: Row) -> str:
    answer = row["answer"]
    return "" if isinstance(answer, str) and answer else "answer: expected a text, not empty"


def _ask_answer(row: Row) -> list[Pair]:
    return [(row["context"], row["answer"])]


def _judge_answer(row: Row, scores: Sequence[Score]) -> list[bool]:
    """Whether the model, taking the most likely token each time, would write the answer."""
    return [scores[0].is_greedy]


KINDS = (
    Kind(
        ("context", "choices", "gold"),
        _check_choices,
        _ask_choices,
        COMPARISONS,
        _judge_choices,
    ),
    Kind(("context", "answer"), _check_answer, _ask_answer, ("exact_match",), _judge_answer),
)
KNOWN = " or ".join("{" + ", ".join(kind.columns) + "}" for kind in KINDS)


# ---- files ----


def read_questions(path: str) -> tuple[Kind, list[Row]]:
    """The rows of a file, and the kind that the columns of its first row tell.

    Empty lines are left out. Raises UsageError, with the number of the line, for what cannot be
    read.
    """
    try:
        # Some editors begin a file with a byte order mark, which `utf-8-sig` drops.
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"questions {path}: cannot be read: {describe_error(error)}") from None

    kind = None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the second for lists in lists without end
            row = None
        kind = kind or _find_kind(row)
        wrong = _find_fault(row, kind)
        if wrong:
            raise UsageError(f"questions {path}, line {number}: {wrong}")
        rows.append(row)
    if not rows or not kind:
        raise UsageError(f"questions {path}: has no rows; give a file of JSON lines")
    return kind, rows


def _find_kind(row: Any) -> Kind | None:
    if not isinstance(row, dict):
        return None
    return next((kind for kind in KINDS if row.keys() >= set(kind.columns)), None)


def _find_fault(row: Any, kind: Kind | None) -> str:
    """What is wrong with a row, or ""."""
    if not isinstance(row, dict):
        return f"is no JSON object; expected {KNOWN}"
    if kind is None:
        return f"has the columns {', '.join(row)}; expected {KNOWN}"
    missing = [name for name in kind.columns if name not in row]
    if missing:
        return f"has no {missing[0]}; all rows of a file are of the kind of its first"
    if not isinstance(row["context"], str):
        return "context: expected a text"
    return kind.check(row)


def name_files(paths: Iterable[str]) -> dict[str, str]:
    """{name: path} of files, named without folder and suffix.

    Raises UsageError if two of them have one name, because their metrics would too.
    """
    names: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        if name in names:
            raise UsageError(
                f"questions {names[name]} and {path}: both would be named {name}; rename one"
            )
        names[name] = path
    return names


# ---- what is asked ----


class Asked(NamedTuple):
    """The questions of a file that fit a model, with the requests of each row.

    `left_out` counts those that do not fit.
    """

    kind: Kind
    rows: list[Row]
    requests: list[list[Request]]
    left_out: int


def ask_file(model, tokenizer, path: str, report: Say) -> Asked:
    """Reads the questions of a file, and leaves out those whose answer exceeds the context.

    `report` gets one line if there are such. Raises UsageError as `read_questions` does, if a
    question cannot be scored, or if none fits.
    """
    kind, rows = read_questions(path)
    asked = [kind.ask(row) for row in rows]
    try:
        encoded = encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs])
    except UsageError as error:
        raise UsageError(f"questions {path}: {error}") from None

    remaining = iter(encoded)
    kept = []
    for number, (row, pairs) in enumerate(zip(rows, asked, strict=True), 1):
        own = [next(remaining) for _ in pairs]
        if any(is_too_long(request, model.max_seq) for request in own):
            continue
        for request in own:
            fit_request(f"questions {path}, row {number}", request, model.max_seq, model.vocab)
        kept.append((row, own))

    left_out = len(rows) - len(kept)
    line = f"{left_out} of {len(rows)} questions of {path} do not fit the context of "
    if not kept:
        raise UsageError(f"{line}{model.max_seq}, so none is left; give shorter answers")
    if left_out:
        report(f"{line}{model.max_seq} and are left out")
    return Asked(kind, [row for row, _ in kept], [own for _, own in kept], left_out)


def check_questions(model, tokenizer, paths: Iterable[str], report: Say) -> None:
    """Raises UsageError if questions cannot be read, or do not fit this tokenizer and model.

    A run calls this before training, so that the error does not come after hours. `report` gets a
    line for each file of which questions are left out.
    """
    for path in name_files(paths).values():
        ask_file(model, tokenizer, path, report)


# ---- what is measured ----


def measure_questions(
    subject: Subject,
    paths: Iterable[str],
    report: Say,
    tick: Callable[[], None] = carry_on,
) -> dict[str, float]:
    """`eval/<file>/<metric>` of each file: a rate, its standard error, and four counts.

    `acc` and `exact_match` are the parts of questions that are answered right. `acc_norm_token`,
    `acc_norm_byte` and `acc_norm_unconditional` compare choices by their log-probability a token,
    a byte, and less that without the question. `questions` counts the rows that were asked, and
    `left_out` those whose answer exceeds the context. `cut` counts the contexts that did not fit.
    `not_finite` counts the rows with a score that is NaN or infinite, which are wrong by each
    metric.

    `report` gets a line for each of these counts but the first that is not 0. `tick` is called
    before each batch. All processes of a job must call this together. Raises UsageError as
    `ask_file` does.
    """
    model, compute, params, tokenizer = subject
    metrics: dict[str, float] = {}
    for name, path in name_files(paths).items():
        kind, rows, requests, left_out = ask_file(model, tokenizer, path, report)
        together = [request for own in requests for request in own]
        scores = score_requests(model, compute, params, together, report, tick)

        remaining = iter(scores)
        by_row = [[next(remaining) for _ in own] for own in requests]
        judged = [_judge(kind, row, own) for row, own in zip(rows, by_row, strict=True)]
        not_finite = sum(not _is_finite(own) for own in by_row)
        if not_finite:
            report(
                f"{not_finite} of {len(rows)} questions of {path} have a score that is not finite, "
                "and count as wrong"
            )
        counts = {
            "questions": len(rows),
            "left_out": left_out,
            "cut": sum(score.cut > 0 for score in scores),
            "not_finite": not_finite,
        }
        found = summarize(judged) | counts
        metrics |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
    return metrics


def _is_finite(scores: Sequence[Score]) -> bool:
    return all(math.isfinite(score.total) for score in scores)


def _judge(kind: Kind, row: Row, scores: Sequence[Score]) -> dict[str, bool]:
    """{metric: right or not}. A row with a score that is not finite is wrong by each metric.

    The best of NaNs would be the first one, so a broken model would look like one that guesses.
    """
    if not _is_finite(scores):
        return dict.fromkeys(kind.metrics, False)
    return dict(zip(kind.metrics, kind.judge(row, scores), strict=True))


def summarize(judged: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The mean of each metric, and its standard error: that of a mean, from the sample."""
    summary: dict[str, float] = {}
    count = len(judged)
    for name in judged[0]:
        rate = sum(right[name] for right in judged) / count
        summary[name] = rate
        summary[f"{name}_stderr"] = math.sqrt(rate * (1 - rate) / max(1, count - 1))
    return summary
