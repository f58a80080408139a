"""What a checkpoint answered, question by question, as values and as a file.

A question has a key, made of its texts. Two files of results can therefore be compared question by
question, whatever the tokenizers of their models are.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, digest_json
from gpt_jax.schema import Each, Misfit, read_json

FORMAT = 1


class Shown(NamedTuple):
    """A question in words, with what the model makes of it.

    `values` are what is compared, in nats. `shares` are probabilities: of each option among all
    of them, or of the only one among all texts. `chosen` is the model's option. It is None where
    there is one option, or a value that is not finite.
    """

    context: str
    options: Sequence[str]
    gold: int
    values: Sequence[float]
    shares: Sequence[float]
    chosen: int | None


class Answer(NamedTuple):
    """The answer to one question.

    `row` is its place in the file, from 1. `right` has a truth for each metric of its task.
    """

    row: int
    key: str
    right: tuple[bool, ...]
    shown: Shown | None = None


class TaskResult(NamedTuple):
    """The answers of a task. `baseline` is the rate of guessing, where it is known.

    Tasks with one `source` ask the same rows, perhaps in other words. `counts` has `left_out`,
    `cut` and `not_finite`.
    """

    name: str
    metrics: tuple[str, ...]
    answers: Sequence[Answer]
    counts: Mapping[str, int]
    baseline: float | None = None
    shots: int | None = None
    source: str = ""


# ---- numbers ----


def make_key(pairs: Sequence[Any]) -> str:
    """The key of a question that is asked with these texts."""
    return digest_json(pairs)[:12]


def show(context: str, options: Sequence[str], gold: int, values: Sequence[float]) -> Shown:
    """The question in words, with the part that the model gives to each option."""
    finite = all(map(math.isfinite, values))
    if not finite:
        return Shown(context, options, gold, values, [math.nan] * len(values), None)
    if len(values) == 1:
        return Shown(context, options, gold, values, [math.exp(values[0])], None)
    best = max(values)
    weights = [math.exp(value - best) for value in values]
    shares = [weight / sum(weights) for weight in weights]
    return Shown(context, options, gold, values, shares, list(values).index(best))


def find_rate(task: TaskResult, metric: str) -> float:
    """The part of a task's answers that are right."""
    place = task.metrics.index(metric)
    return sum(answer.right[place] for answer in task.answers) / len(task.answers)


def find_stderr(rate: float, count: int) -> float:
    """The standard error of a rate: that of a mean, from the sample."""
    return math.sqrt(rate * (1 - rate) / max(1, count - 1))


def center(rate: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (rate - baseline) / (1 - baseline)


def summarize_task(task: TaskResult) -> dict[str, float]:
    """Each metric and its standard error, the centred ones where guessing is known, and counts."""
    summary: dict[str, float] = {}
    count = len(task.answers)
    for metric in task.metrics:
        rate = find_rate(task, metric)
        summary[metric] = rate
        summary[f"{metric}_stderr"] = find_stderr(rate, count)
        if task.baseline is not None:
            summary[f"{metric}_centred"] = center(rate, task.baseline)
    return summary | {"questions": count, **task.counts}


# ---- files ----

ANSWER = ("count", "text", ["flag"])
SCHEMA = {
    "format": {FORMAT},
    "checkpoint": "text",
    "step": "count",
    "tasks": Each(
        {
            "metrics": ["text"],
            "answers": [ANSWER],
            "baseline": "number or null",
            "source": "text",
        }
    ),
}


def to_json(tasks: Sequence[TaskResult]) -> dict[str, Any]:
    """Tasks as values of JSON, which has neither NaN nor infinity: those become None."""
    return {"format": FORMAT, "tasks": {task.name: _to_json(task) for task in tasks}}


def _to_json(task: TaskResult) -> dict[str, Any]:
    examples = []
    for answer in task.answers:
        if answer.shown:
            fields = {
                "row": answer.row,
                "right": dict(zip(task.metrics, answer.right, strict=True)),
            }
            examples.append(fields | _without_nan(answer.shown._asdict()))
    return {
        "metrics": list(task.metrics),
        "summary": summarize_task(task),
        "baseline": task.baseline,
        "shots": task.shots,
        "source": task.source,
        "examples": examples,
        "answers": [[answer.row, answer.key, list(answer.right)] for answer in task.answers],
    }


def _without_nan(fields: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        name: [value if math.isfinite(value) else None for value in fields[name]]
        for name in ("values", "shares")
    }
    return fields | numbers


class Results(NamedTuple):
    """The results in a file, without texts."""

    checkpoint: str
    step: int
    tasks: dict[str, TaskResult]


def read_results(path: str) -> Results:
    """Reads a file that `gpt-jax evaluate --out` wrote.

    Raises UsageError if the file cannot be read, or holds something else.
    """
    try:
        values = read_json(Path(path).read_bytes(), SCHEMA)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None
    except Misfit as error:
        raise UsageError(
            f"{path}: holds no results of questions ({error}); give a file that "
            "gpt-jax evaluate --out wrote"
        ) from None

    tasks = {}
    for name, task in values["tasks"].items():
        answers = [Answer(row, key, tuple(right)) for row, key, right in task["answers"]]
        metrics = tuple(task["metrics"])
        if not answers or any(len(answer.right) != len(metrics) for answer in answers):
            raise UsageError(f"{path}: the answers of {name} are damaged; write the file again")
        tasks[name] = TaskResult(
            name, metrics, answers, {}, task["baseline"], source=task["source"]
        )
    return Results(values["checkpoint"], values["step"], tasks)
