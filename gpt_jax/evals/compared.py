"""Two sets of results, task by task, on the questions that both have."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpt_jax.evals.paired import Paired, compare_answers
from gpt_jax.evals.results import TaskResult


class Compared(NamedTuple):
    """A task by one metric. `old` and `new` are rates over the questions that both were asked.

    `apart` counts the questions that one alone was asked.
    """

    task: str
    metric: str
    old: float
    new: float
    paired: Paired
    apart: int


def pair_rights(old: TaskResult, new: TaskResult, metric: str) -> dict[int, tuple[bool, bool]]:
    """{row: (right of old, right of new)} of the questions that both were asked.

    A question is the same if its row and its texts are.
    """
    here = old.metrics.index(metric)
    there = new.metrics.index(metric)
    before = {(answer.row, answer.key): answer.right[here] for answer in old.answers}
    return {
        answer.row: (before[answer.row, answer.key], answer.right[there])
        for answer in new.answers
        if (answer.row, answer.key) in before
    }


def compare_tasks(
    old: Mapping[str, TaskResult], new: Sequence[TaskResult]
) -> tuple[list[Compared], list[str]]:
    """Each metric of each task that both have, and the names of tasks that cannot be compared."""
    compared = []
    apart = [name for name in old if name not in {task.name for task in new}]
    for task in new:
        other = old.get(task.name)
        own = []
        for metric in task.metrics:
            if other and metric in other.metrics:
                own += _compare(other, task, metric)
        if not own:
            apart.append(task.name)
        compared += own
    return compared, apart


def _compare(old: TaskResult, new: TaskResult, metric: str) -> list[Compared]:
    pairs = pair_rights(old, new, metric)
    if not pairs:
        return []
    before, after = zip(*pairs.values(), strict=True)
    count = len(pairs)
    apart = len(old.answers) + len(new.answers) - 2 * count
    paired = compare_answers(before, after)
    return [Compared(new.name, metric, sum(before) / count, sum(after) / count, paired, apart)]
