"""Tasks of lm-evaluation-harness, asked of a trained model.

The package lm_eval is imported when a task is asked for. It reads the tasks, and computes the
metrics from log-probabilities and texts.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpt_jax.errors import UsageError, install_command, plain
from gpt_jax.evals.harness_model import HarnessMethods
from gpt_jax.evals.subject import Subject

# Draws for the standard error of a metric that has no formula for it, such as a perplexity. The
# harness's own 100,000 take hours in one process, and its many processes are forks of one that has
# the threads of JAX.
BOOTSTRAPS = 1000


class TaskSettings(NamedTuple):
    """What is asked. None leaves it to the task."""

    names: Sequence[str]
    folder: str | None = None  # of further tasks
    num_fewshot: int | None = None
    limit: int | None = None  # documents of each task
    log_samples: bool = False


def run_tasks(
    subject: Subject, settings: TaskSettings, report: Callable[[str], None]
) -> dict[str, Any]:
    """The harness's results of its tasks, as its own command has them.

    All processes of a job must call this together, and get the same. Raises UsageError if the
    package is missing, if a task is unknown, or if its data cannot be had.
    """
    try:
        from lm_eval.evaluator import (  # pyright: ignore[reportMissingImports] an extra
            simple_evaluate,
        )

        harness_model = make_harness_model(subject, report)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--lm_eval: needs the package {error.name}; {install_command('lm_eval')}"
        ) from None

    manager, names = find_tasks(settings)
    try:
        return simple_evaluate(
            harness_model,
            tasks=names,
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            log_samples=settings.log_samples,
            bootstrap_iters=BOOTSTRAPS,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UsageError(
            f"--lm_eval={','.join(settings.names)}: the data of a task cannot be read: "
            f"{plain(error)}"
        ) from None


def make_harness_model(subject: Subject, report: Callable[[str], None]) -> Any:
    """A model for the harness. Raises ModuleNotFoundError without its package."""
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports] an extra

    class HarnessModel(HarnessMethods, TemplateLM):
        """The harness takes its own models alone."""

    return HarnessModel(subject, report)


def find_tasks(settings: TaskSettings) -> tuple[Any, list[str]]:
    """(task manager, names of its tasks). The own folder is looked through first.

    Reading the package's own thousands of tasks takes seconds, so that waits until a name is not
    in the folder. Raises UsageError for an unknown name, or for a folder without tasks.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] an extra

    own = settings.folder
    if own:
        manager = TaskManager(include_path=own, include_defaults=False)
        if not manager.all_tasks:
            raise UsageError(f"--include_path={own}: has no task; give a folder of YAML files")
        if all(manager.match_tasks([name]) for name in settings.names):
            return manager, manager.match_tasks(list(settings.names))

    manager = TaskManager(include_path=own)
    for name in settings.names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else "; give its folder as --include_path"
            raise UsageError(f"--lm_eval={name}: no such task{hint}")
    return manager, manager.match_tasks(list(settings.names))


class Measured(NamedTuple):
    """One metric of a task. `stderr` is None where the harness has none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None


def list_measured(results: dict[str, Any]) -> list[Measured]:
    """The metrics of the harness's results, in its order.

    A metric is named `acc`, or `acc,filter` where the task has a filter.
    """
    rows = []
    for task, metrics in results["results"].items():
        shots = results["n-shot"].get(task)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                Measured(
                    task,
                    metric if kind == "none" else key,
                    float(value),
                    stderr if isinstance(stderr, float) else None,
                    shots,
                )
            )
    return rows
