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
from gpt_jax.infer import Score, carry_on, encode_pairs, fit_request, score_requests

Pair = tuple[str, str]  # a context and its continuation
Row = dict[str, Any]


class Kind(NamedTuple):
    """A kind of question: the columns that it must have, and how it is asked and judged.

    `check(row)` says what is wrong with a row, or "". `ask(row)` gives pairs of texts. `judge(row,
    scores)` gives {metric: right or not} from the scores of those pairs.
    """

    columns: tuple[str, ...]
    check: Callable[[Row], str]
    ask: Callable[[Row], list[Pair]]
    judge: Callable[[Row, Sequence[Score]], dict[str, bool]]


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


def _judge_choices(row: Row, scores: Sequence[Score]) -> dict[str, bool]:
    """Whether the best choice is the right one, by four ways to compare them.

    The bytes are those of a choice without the white space around it, as in
    lm-evaluation-harness.
    """
    count = len(row["choices"])
    totals = np.array([score.total for score in scores])
    tokens = np.array([len(score.logprobs) for score in scores[:count]])
    sizes = np.array([len(choice.strip().encode()) for choice in row["choices"]])
    given = totals[:count]
    ranked = {
        "acc": given,
        "acc_norm_token": given / tokens,
        "acc_norm_byte": given / sizes,
        "acc_norm_unconditional": given - totals[count:],
    }
    return {name: int(values.argmax()) == row["gold"] for name, values in ranked.items()}


# ---- exact match ----


def _check_answer(row: Row) -> str:
    answer = row["answer"]
    return "" if isinstance(answer, str) and answer else "answer: expected a text, not empty"


def _ask_answer(row: Row) -> list[Pair]:
    return [(row["context"], row["answer"])]


def _judge_answer(row: Row, scores: Sequence[Score]) -> dict[str, bool]:
    """Whether the model, taking the most likely token each time, would write the answer."""
    return {"exact_match": scores[0].is_greedy}


KINDS = (
    Kind(("context", "choices", "gold"), _check_choices, _ask_choices, _judge_choices),
    Kind(("context", "answer"), _check_answer, _ask_answer, _judge_answer),
)
KNOWN = " or ".join("{" + ", ".join(kind.columns) + "}" for kind in KINDS)


# ---- files ----


def read_questions(path: str) -> tuple[Kind, list[Row]]:
    """The rows of a file, and the kind that the columns of its first row tell.

    Empty lines are left out. Raises UsageError, with the number of the line, for what cannot be
    read.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"questions {path}: cannot be read: {describe_error(error)}") from None

    kind = None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
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


# ---- what is measured ----


def measure_questions(
    subject: Subject,
    paths: Iterable[str],
    report: Callable[[str], None],
    tick: Callable[[], None] = carry_on,
) -> dict[str, float]:
    """`eval/<file>/<metric>` of each file: a rate, its standard error, and two counts.

    `acc` and `exact_match` are the parts of questions that are answered right. `acc_norm_token`,
    `acc_norm_byte` and `acc_norm_unconditional` compare choices by their log-probability a token,
    a byte, and less that without the question. `questions` counts the rows, and `cut` the contexts
    that did not fit.

    `tick` is called before each batch. All processes of a job must call this together. Raises
    UsageError as `read_questions` does, and if an answer cannot be scored.
    """
    model, compute, params, tokenizer = subject
    metrics: dict[str, float] = {}
    for name, path in name_files(paths).items():
        kind, rows = read_questions(path)
        asked = [kind.ask(row) for row in rows]
        requests = _encode(tokenizer, asked, path)
        scores = score_requests(model, compute, params, requests, report, tick)

        remaining = iter(scores)
        own = [[next(remaining) for _ in pairs] for pairs in asked]
        judged = [kind.judge(row, found) for row, found in zip(rows, own, strict=True)]
        found = summarize(judged)
        found |= {"questions": len(rows), "cut": sum(score.cut > 0 for score in scores)}
        metrics |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
    return metrics


def summarize(judged: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The mean of each metric, and its standard error: that of a mean, from the sample."""
    summary: dict[str, float] = {}
    count = len(judged)
    for name in judged[0]:
        rate = sum(right[name] for right in judged) / count
        summary[name] = rate
        summary[f"{name}_stderr"] = math.sqrt(rate * (1 - rate) / max(1, count - 1))
    return summary


def _encode(tokenizer, asked: Sequence[list[Pair]], path: str):
    try:
        return encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs])
    except UsageError as error:
        raise UsageError(f"questions {path}: {error}") from None


def check_questions(model, tokenizer, paths: Iterable[str]) -> None:
    """Raises UsageError if questions cannot be read, or do not fit this tokenizer and model.

    A run calls this before training, so that the error does not come after hours.
    """
    for path in name_files(paths).values():
        kind, rows = read_questions(path)
        asked = [kind.ask(row) for row in rows]
        requests = iter(_encode(tokenizer, asked, path))
        for number, pairs in enumerate(asked, 1):
            for _ in pairs:
                name = f"questions {path}, row {number}"
                fit_request(name, next(requests), model.max_seq, model.vocab)
