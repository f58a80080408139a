"""CORE: 22 tasks of a local bundle, asked with examples before each question (arXiv:2406.11794).

An option is as good as the mean log-probability of its tokens. A continuation without options is
right if each of its tokens is the most likely one.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.errors import UsageError
from gpt_jax.evals.core_prompts import (
    CORE_KINDS,
    Prompt,
    Row,
    make_prompt,
    make_requests,
    shuffle_rows,
)
from gpt_jax.evals.core_tasks import BY_NAME, CORE_TASKS, CoreTask
from gpt_jax.evals.results import Answer, TaskResult, make_key, show
from gpt_jax.evals.subject import Subject
from gpt_jax.evals.text_files import UNPACK, read_text_file
from gpt_jax.infer import Request, Score, carry_on, fit_request, is_too_long, score_requests

Say = Callable[[str], None]
# Where the files of a bundle may lie: nanochat's, llm-foundry's, and a folder made by hand.
FOLDERS = ("eval_data", "local_data", "")


class CoreSettings(NamedTuple):
    """What is asked of a bundle. Without `names` all of the 22 tasks are.

    `limit` asks only so many questions of each task, 0 all of them. `examples` are kept with their
    texts.
    """

    bundle: str
    names: Sequence[str] = ()
    limit: int = 0
    examples: int = 0


# ---- files ----


def find_core_file(bundle: str, task: CoreTask) -> Path | None:
    """The file of a task, in a folder for its subject or without one, or None."""
    for folder in FOLDERS:
        for name in (task.file, Path(task.file).name):
            for ending in ("", *UNPACK):
                path = Path(bundle, folder, name + ending)
                if path.is_file():
                    return path
    return None


def read_rows(path: Path, task: CoreTask) -> list[Row]:
    """The rows of a task in the order in which they are asked.

    Raises UsageError, with the number of the line, for what cannot be read, and if there are too
    few rows to draw examples from.
    """
    kind = CORE_KINDS[task.kind]
    what = f"{task.name}: {path}"
    rows = []
    for number, line in enumerate(read_text_file(what, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{what}, line {number}: is no JSON object")
        missing = [name for name in kind.columns if name not in row]
        if missing:
            raise UsageError(
                f"{what}, line {number}: has no {missing[0]}; its columns are {', '.join(row)}, "
                f"and a task of {task.kind} has {', '.join(kind.columns)}"
            )
        wrong = kind.check(row)
        if wrong:
            raise UsageError(f"{what}, line {number}: {wrong}")
        rows.append(row)
    if len(rows) <= task.shots:
        raise UsageError(
            f"{what}: has {len(rows)} rows, and each question needs {task.shots} others as examples"
        )
    return shuffle_rows(rows)


def check_core(settings: CoreSettings) -> tuple[dict[str, Path], list[str]]:
    """Returns ({task: its file}, the tasks that have none), in the order of the table.

    Raises UsageError for a name that is no task, and if no task has a file.
    """
    unknown = [name for name in settings.names if name not in BY_NAME]
    if unknown:
        raise UsageError(f"--core_tasks={unknown[0]}: choose among {', '.join(BY_NAME)}")

    paths = {}
    missing = []
    for task in CORE_TASKS:
        if settings.names and task.name not in settings.names:
            continue
        path = find_core_file(settings.bundle, task)
        if path:
            paths[task.name] = path
        else:
            missing.append(task.name)
    if not paths:
        first = BY_NAME[missing[0]].file
        raise UsageError(
            f"--core={settings.bundle}: holds no file of a task; {missing[0]}, for one, is looked "
            f"for as {first}, there or in its folders eval_data and local_data"
        )
    return paths, missing


# ---- what is asked ----


def measure_core(
    subject: Subject, settings: CoreSettings, report: Say, tick: Callable[[], None] = carry_on
) -> list[TaskResult]:
    """The answers of each task that the bundle holds, by the metric `acc`.

    `report` gets a line for each task, and others for tasks without a file and for what was cut,
    left out or not finite. `tick` is called before each batch. All processes of a job must call
    this together. Raises UsageError for files that cannot be used, before anything is asked.
    """
    paths, missing = check_core(settings)
    if missing:
        report(f"tasks without a file in {settings.bundle}: {', '.join(missing)}")
    for name, path in paths.items():
        read_rows(path, BY_NAME[name])

    results = []
    for name, path in paths.items():
        task = BY_NAME[name]
        result = measure_core_task(subject, task, path, settings, report, tick)
        if result:
            results.append(result)
    if not results:
        raise UsageError(
            f"--core={settings.bundle}: no question fits the model's context of "
            f"{subject.model.max_seq} tokens"
        )
    return results


class AskedCore(NamedTuple):
    """The questions of a task that fit a model: the shuffled row, prompt and requests of each.

    They are by the number of the row. `left_out` counts those that do not fit.
    """

    rows: dict[int, Row]
    prompts: dict[int, Prompt]
    requests: dict[int, list[Request]]
    left_out: int


def ask_core_task(
    subject: Subject, task: CoreTask, path: Path, limit: int, report: Say
) -> AskedCore:
    """Makes the questions of a task. `report` gets a line if some do not fit the context."""
    rows = read_rows(path, task)
    # Examples are drawn from all rows, so that a limit changes no prompt.
    asked = rows[:limit] if limit else rows
    prompts = [make_prompt(task, rows, number) for number in range(len(asked))]
    try:
        requests = make_requests(subject.tokenizer, task, prompts)
    except UsageError as error:
        raise UsageError(f"{task.name}: {path}: {error}") from None

    context = subject.model.max_seq
    kept = {}
    for number, own in enumerate(requests):
        if any(is_too_long(request, context) for request in own):
            continue
        for request in own:
            fit_request(f"{task.name}, row {number + 1}", request, context, subject.model.vocab)
        kept[number] = own

    left_out = len(asked) - len(kept)
    if left_out:
        report(
            f"{task.name}: {left_out} of {len(asked)} questions have a continuation that does "
            f"not fit the context of {context}, and are left out"
        )
    by_number = {number: asked[number] for number in kept}
    return AskedCore(by_number, {number: prompts[number] for number in kept}, kept, left_out)


def measure_core_task(
    subject: Subject,
    task: CoreTask,
    path: Path,
    settings: CoreSettings,
    report: Say,
    tick: Callable[[], None] = carry_on,
) -> TaskResult | None:
    """The answers of one task, or None if no question fits the context."""
    asked = ask_core_task(subject, task, path, settings.limit, report)
    if not asked.requests:
        return None

    def tell(line: str) -> None:
        report(f"{task.name}: {line}")

    together = [request for own in asked.requests.values() for request in own]
    about = subject.model, subject.compute, subject.params
    scores = iter(score_requests(*about, together, tell, tick))
    answers = []
    cut = 0
    not_finite = 0
    for place, (number, requests) in enumerate(asked.requests.items()):
        own = [next(scores) for _ in requests]
        row = asked.rows[number]
        is_shown = place < settings.examples
        answers.append(answer_core(task, row, number, asked.prompts[number], own, is_shown))
        cut += any(score.cut for score in own)
        not_finite += not _is_finite(own)
    if not_finite:
        tell(
            f"{not_finite} of {len(answers)} questions have a score that is not finite, and count "
            "as wrong"
        )
    counts = {"left_out": asked.left_out, "cut": cut, "not_finite": not_finite}
    baseline = task.baseline / 100
    return TaskResult(task.name, ("acc",), answers, counts, baseline, task.shots, task.file)


def _is_finite(scores: Sequence[Score]) -> bool:
    return all(math.isfinite(score.total) for score in scores)


def answer_core(
    task: CoreTask, row: Row, number: int, prompt: Prompt, scores: Sequence[Score], is_shown: bool
) -> Answer:
    """Judges a question. A score that is not finite makes it wrong."""
    values = [score.total / len(score.logprobs) for score in scores]
    if len(scores) == 1:
        gold = 0
        values = [scores[0].total]
        right = scores[0].is_greedy
    else:
        gold = row["gold"]
        right = int(np.argmax(values)) == gold
    right = bool(right and _is_finite(scores))

    shown = None
    if is_shown:
        kind = CORE_KINDS[task.kind]
        shown = show(row[kind.shared], kind.name_options(row), gold, values)
    return Answer(number + 1, make_key([prompt.options, gold]), (right,), shown)
