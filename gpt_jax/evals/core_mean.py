"""The mean of CORE's tasks: its name, its standard error, and how two of them differ."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gpt_jax.evals.compared import pair_rights
from gpt_jax.evals.core_tasks import CORE_TASKS
from gpt_jax.evals.paired import (
    Difference,
    Source,
    add_rows,
    compare_sums,
    find_stderr_of_sum,
)
from gpt_jax.evals.results import TaskResult, center, find_rate

# {row: what its answer counts}, of each task
Counted = Sequence[tuple[TaskResult, Mapping[int, float]]]


class CoreMean(NamedTuple):
    """The mean of centred accuracies. `label` is CORE, or says why it is not."""

    label: str
    value: float
    stderr: float


def find_core_mean(tasks: Sequence[TaskResult], limit: int = 0) -> CoreMean:
    """The mean over `tasks`. It is CORE if these are all 22 tasks, with all of their questions."""
    value = math.fsum(center(find_rate(task, "acc"), _base(task)) for task in tasks) / len(tasks)
    right = [
        (task, {answer.row: float(answer.right[0]) for answer in task.answers}) for task in tasks
    ]
    return CoreMean(name_mean(tasks, limit), value, find_stderr_of_sum(_weigh(right)))


def name_mean(tasks: Sequence[TaskResult], limit: int = 0) -> str:
    """What a mean over these tasks may be called."""
    count = len(tasks)
    reasons = []
    if count < len(CORE_TASKS):
        reasons.append(f"mean of {count} of {len(CORE_TASKS)}")
    if limit:
        reasons.append(f"of at most {limit} questions each")
    left_out = sum(task.counts["left_out"] for task in tasks)
    if left_out:
        reasons.append(f"without questions that do not fit the context ({left_out})")
    return f"{', '.join(reasons)}, not CORE" if reasons else "CORE"


def compare_core_means(old: Iterable[TaskResult], new: Iterable[TaskResult]) -> Difference | None:
    """How the means over the tasks and questions of both differ, or None if they share none."""
    by_name = {task.name: task for task in old}
    counted = []
    for task in new:
        other = by_name.get(task.name)
        # A file of --questions may have the name of a task, and other metrics.
        if other is None or "acc" not in other.metrics:
            continue
        shared = pair_rights(other, task, "acc")
        if shared:
            counted.append((task, {row: float(b) - float(a) for row, (a, b) in shared.items()}))
    if not counted:
        return None
    rows_of = _weigh(counted)
    most_of: dict[str, float] = {}
    for task, rows in counted:
        most_of[task.source] = most_of.get(task.source, 0.0) + _find_weight(task, rows, counted)
    return compare_sums(
        [Source([*add_rows(parts).values()], most_of[name]) for name, parts in rows_of.items()]
    )


def _base(task: TaskResult) -> float:
    return task.baseline or 0.0


def _find_weight(task: TaskResult, rows: Mapping[int, float], counted: Counted) -> float:
    """What a right answer of a task adds to the mean of tasks, if these rows are counted."""
    return 1 / len(counted) / len(rows) / (1 - _base(task))


def _weigh(counted: Counted) -> dict[str, list[dict[int, float]]]:
    """{source: what its rows add to the mean in each of its tasks}.

    Two tasks of one file are not independent, so what a row counts in both is added later.
    """
    rows_of: dict[str, list[dict[int, float]]] = {}
    for task, values in counted:
        weight = _find_weight(task, values, counted)
        parts = {row: value * weight for row, value in values.items()}
        rows_of.setdefault(task.source, []).append(parts)
    return rows_of
