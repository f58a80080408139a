"""`gpt-jax evaluate` with tasks: questions of local files, and lm-evaluation-harness."""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax.commands.flags import check_number
from gpt_jax.commands.output import emit, write_json
from gpt_jax.errors import SaveFailed, UsageError, escape
from gpt_jax.files import describe_error, is_there, replace_file

Say = Callable[[str], None]
# Values for JSON, lines for people, and what goes to --lm_eval_out.
Answers = tuple[dict[str, Any], list[str], dict[str, Any]]
# Flags that belong to --lm_eval, with the value of each when it is not given.
TASK_FLAGS = {"include_path": None, "num_fewshot": None, "limit": None, "lm_eval_out": None}
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
        help="local .jsonl files of multiple choice (context, choices, gold) or of exact match "
        "(context, answer)",
    )
    group.add_argument(
        "--lm_eval",
        default="",
        metavar="TASK,TASK",
        help="tasks of lm-evaluation-harness, by name; needs the package lm_eval",
    )
    group.add_argument("--include_path", metavar="DIR", help="a folder of further tasks in YAML")
    group.add_argument(
        "--num_fewshot", type=int, metavar="N", help="examples before each question of a task"
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="only the first questions of each task, to try it"
    )
    group.add_argument(
        "--lm_eval_out",
        metavar="FILE.json",
        help="where all results are written, each sample included",
    )


def asks_tasks(args: argparse.Namespace) -> bool:
    return bool(args.questions or args.lm_eval)


def find_given(args: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    """The flags of `defaults` that were given."""
    return [f"--{name}" for name, value in defaults.items() if getattr(args, name) != value]


def check_task_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together, and for numbers out of range."""
    own = find_given(args, TASK_FLAGS)
    if own and not args.lm_eval:
        raise UsageError(f"{own[0]}: belongs to --lm_eval; name tasks there, or leave it out")
    if args.questions and args.lm_eval:
        raise UsageError("--questions: is measured without --lm_eval; call the command twice")
    others = find_given(args, TEXT_FLAGS)
    if asks_tasks(args) and others:
        asked = "--questions" if args.questions else "--lm_eval"
        raise UsageError(f"{others[0]}: is for text; leave it out with {asked}")

    if args.num_fewshot is not None:
        check_number("--num_fewshot", args.num_fewshot, 0)
    if args.limit is not None:
        check_number("--limit", args.limit, 1)
    missing = [path for path in args.questions if not is_there(path)]
    if missing:
        raise UsageError(f"--questions = {missing[0]!r}: no such file")
    if args.include_path and not Path(args.include_path).is_dir():
        raise UsageError(f"--include_path = {args.include_path!r}: no such folder")
    if args.lm_eval_out and not Path(args.lm_eval_out).resolve().parent.is_dir():
        raise UsageError(f"--lm_eval_out = {args.lm_eval_out!r}: its folder does not exist")
    # Unlike Path.is_dir, this takes a name that is too long.
    if args.lm_eval_out and os.path.isdir(args.lm_eval_out):
        raise UsageError(f"--lm_eval_out = {args.lm_eval_out!r}: is a folder; name a file")


def measure_tasks(args: argparse.Namespace, say: Say) -> None:
    """Asks a checkpoint, and prints what it knows. Process 0 alone prints and writes.

    Raises SaveFailed if --lm_eval_out cannot be written; the metrics are printed nevertheless.
    """
    import jax

    from gpt_jax.evals import Subject
    from gpt_jax.run import load_model

    loaded = load_model(args.checkpoint, args.step, say, ignore_miscompiles=args.ignore_miscompiles)
    config = loaded.config
    subject = Subject(config.model, config.compute, loaded.params, loaded.tokenizer)
    with jax.set_mesh(loaded.mesh):
        ask = ask_questions if args.questions else ask_harness
        values, lines, results = ask(args, subject, say)

    if jax.process_index() != 0:
        return
    text = "\n".join(map(escape, lines))
    if args.json:
        text = write_json({"checkpoint": str(loaded.directory), "step": loaded.step} | values, 2)
    # Results may have taken hours: a failure of one place does not keep them from the other.
    try:
        emit(text)
    finally:
        if args.lm_eval_out:
            save_results(args.lm_eval_out, results)


def save_results(path: str, results: dict[str, Any]) -> None:
    """Writes results as JSON. Raises SaveFailed if the disk does not take them."""
    text = json.dumps(results, default=str, ensure_ascii=False, indent=2)
    try:
        replace_file(Path(path), text.encode("utf-8", "replace"))
    except OSError as error:
        raise SaveFailed(
            f"--lm_eval_out={path}: cannot be written: {describe_error(error)}; the samples in it "
            "are lost"
        ) from None


def ask_questions(args: argparse.Namespace, subject, say: Say) -> Answers:
    """The answers to --questions."""
    from gpt_jax.evals import check_questions, measure_questions

    # All files are looked at before the first is asked, and each tells then what it leaves out.
    check_questions(subject.model, subject.tokenizer, args.questions, lambda line: None)
    metrics = measure_questions(subject, args.questions, say)
    lines = [f"{name}: {round(value, 4):g}" for name, value in metrics.items()]
    return {"questions": metrics}, lines, {}


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
    return {"lm_eval": tasks}, align(lines), results


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
