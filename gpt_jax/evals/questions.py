"""Questions of local files, answered by the scores of their answers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gpt_jax.errors import UsageError
from gpt_jax.evals.generated import write_answers
from gpt_jax.evals.question_files import find_questions, read_questions
from gpt_jax.evals.question_kinds import Kind, Row
from gpt_jax.evals.results import (
    Answer,
    TaskResult,
    find_rate,
    find_stderr,
    make_key,
    summarize_task,
)
from gpt_jax.evals.subject import Subject
from gpt_jax.infer import (
    Request,
    Score,
    carry_on,
    encode_pairs,
    fit_request,
    is_too_long,
    score_requests,
)

Say = Callable[[str], None]


# ---- what is asked ----


class Asked(NamedTuple):
    """The questions of a file that fit a model, with the place and the requests of each row.

    `left_out` counts those that do not fit.
    """

    kind: Kind
    rows: list[Row]
    places: list[int]
    requests: list[list[Request]]
    left_out: int


def ask_file(model, tokenizer, path: str, report: Say, limit: int = 0) -> Asked:
    """Reads the questions of a file, and leaves out those whose answer exceeds the context.

    A `limit` above 0 reads only so many. `report` gets one line if some are left out. Raises
    UsageError as `read_questions` does, if a question cannot be scored, or if none fits.
    """
    kind, rows = read_questions(path)
    rows = rows[:limit] if limit else rows
    asked = [kind.ask(row) for row in rows]
    try:
        encoded = encode_pairs(tokenizer, [pair for pairs in asked for pair in pairs])
    except UsageError as error:
        raise UsageError(f"questions {path}: {error}") from None

    remaining = iter(encoded)
    places = []
    requests = []
    for number, pairs in enumerate(asked, 1):
        own = [next(remaining) for _ in pairs]
        # A model that writes needs room for a prompt too.
        new_tokens = kind.settings(rows[number - 1])["max_gen_toks"] if kind.settings else 0
        is_long = any(is_too_long(request, model.max_seq) for request in own)
        if is_long or new_tokens >= model.max_seq:
            continue
        for request in own:
            fit_request(f"questions {path}, row {number}", request, model.max_seq, model.vocab)
        places.append(number)
        requests.append(own)

    left_out = len(rows) - len(places)
    line = f"{left_out} of {len(rows)} questions of {path} do not fit the context of "
    if not places:
        way_out = "lower their max_new_tokens" if kind.settings else "give shorter answers"
        raise UsageError(f"{line}{model.max_seq}, so none is left; {way_out}")
    if left_out:
        report(f"{line}{model.max_seq} and are left out")
    return Asked(kind, [rows[place - 1] for place in places], places, requests, left_out)


def check_questions(model, tokenizer, paths: Iterable[str], report: Say) -> None:
    """Raises UsageError if questions cannot be read, or do not fit this tokenizer and model.

    A run calls this before training, so that the error does not come after hours. `report` gets a
    line for each file of which questions are left out.
    """
    for group in find_questions(paths):
        for path in group.files.values():
            ask_file(model, tokenizer, path, report)


# ---- what is measured ----


def measure_questions(
    subject: Subject,
    paths: Iterable[str],
    report: Say,
    tick: Callable[[], None] = carry_on,
) -> dict[str, float]:
    """`eval/<file>/<metric>` of each file: a rate, its standard error, and four counts.

    `acc`, `exact_match` and `match` are the parts of questions that are answered right.
    `acc_norm_token`, `acc_norm_byte` and `acc_norm_unconditional` compare choices by their
    log-probability a token, a byte, and less that without the question.

    `questions` counts the rows that were asked, and `left_out` those whose answer exceeds the
    context. `cut` counts the contexts that did not fit. `not_finite` counts the rows with a score
    that is NaN or infinite, which are wrong by each metric. A folder has
    `eval/<folder>/<file>/<metric>`, and the same over all of its files.

    `report` gets a line for each of these counts but the first that is not 0. `tick` is called
    before each batch. All processes of a job must call this together. Raises UsageError as
    `ask_file` does.
    """
    tasks = answer_files(subject, paths, report, tick)
    return {f"eval/{name}": value for name, value in summarize_files(tasks).items()}


def answer_files(
    subject: Subject,
    paths: Iterable[str],
    report: Say,
    tick: Callable[[], None] = carry_on,
    limit: int = 0,
    examples: int = 0,
) -> list[TaskResult]:
    """The answers of each file, named by it, or by its folder and itself.

    The first `examples` of each are kept with their texts. Other arguments are those of
    `measure_questions` and `ask_file`.
    """
    tasks = []
    for group in find_questions(paths):
        for name, path in group.files.items():
            asked = ask_file(subject.model, subject.tokenizer, path, report, limit)
            task = _answer_file(subject, asked, path, report, tick, examples)
            if group.is_folder:
                task = task._replace(name=f"{group.name}/{name}", source=group.name)
            else:
                task = task._replace(name=name)
            tasks.append(task)
    return tasks


def _answer_file(
    subject: Subject, asked: Asked, path: str, report: Say, tick: Callable[[], None], examples: int
) -> TaskResult:
    kind = asked.kind
    if kind.settings:
        texts, cut = write_answers(subject, asked.rows, report, tick)
        by_row = [[text] for text in texts]
        finite = [True] * len(texts)
    else:
        by_row, cut = _score(subject, asked, report, tick)
        finite = [all(math.isfinite(score.total) for score in own) for own in by_row]

    answers = []
    for number, (place, row) in enumerate(zip(asked.places, asked.rows, strict=True)):
        # The best of NaNs would be the first one, so a broken model would look like one that
        # guesses. Such a row is wrong by each metric.
        right = (False,) * len(kind.metrics)
        if finite[number]:
            right = tuple(kind.judge(row, by_row[number]))
        shown = kind.show(row, by_row[number]) if number < examples else None
        settings = kind.settings(row) if kind.settings else None
        key = make_key([kind.ask(row), row.get("gold"), settings])
        answers.append(Answer(place, key, right, shown))

    not_finite = finite.count(False)
    if not_finite:
        report(
            f"{not_finite} of {len(answers)} questions of {path} have a score that is not finite, "
            "and count as wrong"
        )
    counts = {"left_out": asked.left_out, "cut": cut, "not_finite": not_finite}
    return TaskResult("", kind.metrics, answers, counts)


def _score(
    subject: Subject, asked: Asked, report: Say, tick: Callable[[], None]
) -> tuple[list[list[Score]], int]:
    """(the scores of each row, how many rows had a context cut)."""
    together = [request for own in asked.requests for request in own]
    about = subject.model, subject.compute, subject.params
    scores = score_requests(*about, together, report, tick)
    remaining = iter(scores)
    by_row = [[next(remaining) for _ in own] for own in asked.requests]
    return by_row, sum(any(score.cut for score in own) for own in by_row)


def summarize_files(tasks: Sequence[TaskResult]) -> dict[str, float]:
    """`<file>/<metric>` of each task, and `<folder>/<metric>` of those that a folder holds."""
    summary = {}
    folders: dict[str, list[TaskResult]] = {}
    for task in tasks:
        summary |= {f"{task.name}/{name}": value for name, value in summarize_task(task).items()}
        if task.source:
            folders.setdefault(task.source, []).append(task)
    for folder, own in folders.items():
        summary |= {f"{folder}/{name}": value for name, value in _summarize_folder(own).items()}
    return summary


def _summarize_folder(tasks: Sequence[TaskResult]) -> dict[str, float]:
    """The metrics that all files have: over all questions, and the mean over files."""
    summary: dict[str, float] = {}
    count = sum(len(task.answers) for task in tasks)
    for metric in tasks[0].metrics:
        if any(metric not in task.metrics for task in tasks):
            continue
        rates = [find_rate(task, metric) for task in tasks]
        pairs = zip(rates, tasks, strict=True)
        rate = sum(rate * len(task.answers) for rate, task in pairs) / count
        summary[metric] = rate
        summary[f"{metric}_stderr"] = find_stderr(rate, count)
        summary[f"{metric}_by_subject"] = sum(rates) / len(rates)
    totals = {name: sum(task.counts[name] for task in tasks) for name in tasks[0].counts}
    return summary | {"subjects": len(tasks), "questions": count, **totals}
