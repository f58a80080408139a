"""`gpt-jax evaluate` with tasks: questions of local files, CORE, and lm-evaluation-harness."""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.commands.evaluate_results import (
    RESULT_FLAGS,
    add_result_flags,
    check_place,
    check_result_flags,
    compare_with_older,
    comparison_to_json,
    list_comparison,
    read_older,
    save,
    write_results,
)
from gpt_jax.commands.flags import check_number
from gpt_jax.commands.output import emit, write_json
from gpt_jax.errors import UsageError, escape
from gpt_jax.files import is_there

Say = Callable[[str], None]


class Answers(NamedTuple):
    """What was asked: values for JSON, lines for people, and what files get.

    `tasks` and `core` are the results of questions and of CORE, and `harness` those of
    lm-evaluation-harness.
    """

    values: dict[str, Any]
    lines: list[str]
    tasks: Sequence = ()
    core: Any = None
    harness: dict[str, Any] | None = None


# The flags that ask, in the order in which an error names them.
ASKING = ("questions", "core", "lm_eval")
# Flags that belong to --lm_eval alone, with the value of each when it is not given.
HARNESS_FLAGS = {"include_path": None, "num_fewshot": None, "lm_eval_out": None}
# Flags of held-out text.
TEXT_FLAGS = {"text": [], "evaluators": [], "batch_size": 0, "batches": 0, "stride": None}


def add_task_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("questions and tasks, instead of held-out text")
    group.add_argument(
        "--questions",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="local files of questions, or folders of them: .jsonl, .csv or HellaSwag's .txt, "
        "perhaps compressed; docs/evaluation.md lists the columns",
    )
    group.add_argument(
        "--core",
        default="",
        metavar="DIR",
        help="a local bundle of the 22 tasks of CORE; docs/evaluation.md lists its files",
    )
    group.add_argument(
        "--core_tasks", default="", metavar="TASK,TASK", help="only these tasks of the bundle"
    )
    group.add_argument(
        "--lm_eval",
        default="",
        metavar="TASK,TASK",
        help="tasks of lm-evaluation-harness, by name; needs the package lm_eval",
    )
    group.add_argument("--include_path", metavar="DIR", help="a folder of further tasks in YAML")
    group.add_argument(
        "--num_fewshot", type=int, metavar="N", help="examples before each question of --lm_eval"
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="only the first questions of each task, to try it"
    )
    group.add_argument(
        "--lm_eval_out",
        metavar="FILE.json",
        help="where all results of --lm_eval are written, each sample included",
    )
    add_result_flags(group)


def asks_tasks(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) for name in ASKING)


def find_given(args: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    """The flags of `defaults` that were given."""
    return [f"--{name}" for name, value in defaults.items() if getattr(args, name) != value]


def check_task_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together, and for numbers out of range."""
    asking = [f"--{name}" for name in ASKING if getattr(args, name)]
    if len(asking) > 1:
        raise UsageError(f"{asking[0]}: is measured without {asking[1]}; call the command twice")
    for defaults, owners in (
        (HARNESS_FLAGS, ("--lm_eval",)),
        ({"core_tasks": ""}, ("--core",)),
        (RESULT_FLAGS, ("--questions", "--core")),
        ({"limit": None}, ("--questions", "--core", "--lm_eval")),
    ):
        own = find_given(args, defaults)
        if own and not set(asking) & set(owners):
            raise UsageError(
                f"{own[0]}: belongs to {' or '.join(owners)}; give that, or leave it out"
            )
    others = find_given(args, TEXT_FLAGS)
    if asking and others:
        raise UsageError(f"{others[0]}: is for text; leave it out with {asking[0]}")

    if args.num_fewshot is not None:
        check_number("--num_fewshot", args.num_fewshot, 0)
    if args.limit is not None:
        check_number("--limit", args.limit, 1)
    missing = [path for path in args.questions if not is_there(path)]
    if missing:
        raise UsageError(f"--questions = {missing[0]!r}: no such file")
    for name in ("include_path", "core"):
        folder = getattr(args, name)
        if folder and not (is_there(folder) and Path(folder).is_dir()):
            raise UsageError(f"--{name} = {folder!r}: no such folder")
    if args.core:
        check_core_tasks(args)
    check_place("--lm_eval_out", args.lm_eval_out)
    check_result_flags(args)


def make_core_settings(args: argparse.Namespace):
    from gpt_jax.evals import CoreSettings

    names = [name for name in args.core_tasks.split(",") if name]
    return CoreSettings(args.core, names, args.limit or 0, args.examples)


def check_core_tasks(args: argparse.Namespace) -> None:
    """Raises UsageError for names that are no tasks, and for a bundle without files."""
    from gpt_jax.evals import check_core

    check_core(make_core_settings(args))


def name_checkpoint(args: argparse.Namespace, loaded) -> str:
    """The URL of a checkpoint, or the folder of the one that was found."""
    return args.checkpoint if "://" in args.checkpoint else str(loaded.directory)


def measure_tasks(args: argparse.Namespace, say: Say) -> None:
    """Asks a checkpoint, and prints what it knows. Process 0 alone prints and writes.

    Raises SaveFailed if a file cannot be written; the metrics are printed nevertheless.
    """
    import jax

    from gpt_jax.evals import Subject
    from gpt_jax.run import load_model

    older = read_older(args) if args.compare else None
    ignored = args.ignore_miscompiles
    loaded = load_model(
        args.checkpoint,
        args.step,
        say,
        ignore_miscompiles=ignored,
        mirror=args.mirror,
        base=args.base,
    )
    config = loaded.config
    subject = Subject(config.model, config.compute, loaded.params, loaded.tokenizer)
    asking = next(name for name in ASKING if getattr(args, name))
    with jax.set_mesh(loaded.mesh):
        answers = ASKERS[asking](args, subject, say)

    if jax.process_index() != 0:
        return
    about = {"checkpoint": name_checkpoint(args, loaded), "step": loaded.step}
    report(args, answers, about, older)


def report(args: argparse.Namespace, answers: Answers, about: dict[str, Any], older) -> None:
    """Prints answers, and writes the files that were asked for."""
    from gpt_jax.evals import Page

    lines = list(answers.lines)
    values = about | answers.values
    comparison = None
    if older:
        comparison = compare_with_older(older, answers.tasks, bool(args.core))
        lines += list_comparison(comparison, align)
        values["compared"] = comparison_to_json(comparison)

    text = "\n".join(map(escape, lines))
    if args.json:
        text = write_json(values, 2)
    subtitle = f"{about['checkpoint']}, step {about['step']}"
    page = Page("Answers", subtitle, answers.tasks, answers.core, comparison)
    # Results may have taken hours: a failure of one place does not keep them from the other.
    try:
        emit(text)
    finally:
        if args.lm_eval_out:
            harness = json.dumps(answers.harness, default=str, ensure_ascii=False, indent=2)
            save("--lm_eval_out", args.lm_eval_out, harness)
        write_results(args, page, values)


def ask_questions(args: argparse.Namespace, subject, say: Say) -> Answers:
    """The answers to --questions."""
    from gpt_jax.evals import answer_files, check_questions, summarize_files

    # All files are looked at before the first is asked, and each tells then what it leaves out.
    check_questions(subject.model, subject.tokenizer, args.questions, lambda line: None)
    tasks = answer_files(
        subject, args.questions, say, limit=args.limit or 0, examples=args.examples
    )
    metrics = {f"eval/{name}": value for name, value in summarize_files(tasks).items()}
    lines = [f"{name}: {round(value, 4):g}" for name, value in metrics.items()]
    return Answers({"questions": metrics}, lines, tasks)


def ask_core(args: argparse.Namespace, subject, say: Say) -> Answers:
    """The answers to --core."""
    from gpt_jax.evals import check_core, find_core_mean, measure_core, summarize_task

    settings = make_core_settings(args)
    tasks = measure_core(subject, settings, say)
    mean = find_core_mean(tasks, settings.limit)
    rows: list[tuple[str, ...]] = [
        ("task", "shots", "questions", "acc", "stderr", "guessing", "centred", "cut", "left out")
    ]
    summaries = {task.name: summarize_task(task) for task in tasks}
    for task in tasks:
        own = summaries[task.name]
        rates = [own["acc"], own["acc_stderr"], task.baseline or 0.0, own["acc_centred"]]
        counts = [str(own["cut"]), str(own["left_out"])]
        cells = [f"{rate:.4f}" for rate in rates]
        rows.append((task.name, str(task.shots), str(own["questions"]), *cells, *counts))
    missing = check_core(settings)[1]
    values = mean._asdict() | {"missing": missing, "tasks": summaries}
    lines = align(rows)
    if missing:
        lines.append(f"missing: {', '.join(missing)}")
    lines.append(f"{mean.label}: {mean.value:.4f} (standard error {mean.stderr:.4f})")
    return Answers({"core": values}, lines, tasks, mean)


def ask_harness(args: argparse.Namespace, subject, say: Say) -> Answers:
    """The answers to --lm_eval."""
    from gpt_jax.evals import TaskSettings, list_measured, run_tasks

    # Forks of a process that has the threads of JAX may hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    settings = TaskSettings(
        args.lm_eval.split(","),
        args.include_path,
        args.num_fewshot,
        args.limit,
        bool(args.lm_eval_out),
    )
    results = run_tasks(subject, settings, say)
    lines = [("task", "shots", "metric", "value", "stderr")]
    for row in list_measured(results):
        stderr = "-" if row.stderr is None else f"{row.stderr:.4f}"
        shots = "-" if row.shots is None else str(row.shots)
        lines.append((row.task, shots, row.metric, f"{row.value:.4f}", stderr))
    tasks: dict[str, dict] = {}
    for row in list_measured(results):
        value = without_nan({"value": row.value, "stderr": row.stderr})
        tasks.setdefault(row.task, {"shots": row.shots})[row.metric] = value
    return Answers({"lm_eval": tasks}, align(lines), harness=results)


ASKERS: dict[str, Callable[[argparse.Namespace, Any, Say], Answers]] = {
    "questions": ask_questions,
    "core": ask_core,
    "lm_eval": ask_harness,
}


def align(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has neither NaN nor infinity: those become None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
