"""What `gpt-jax evaluate` does with answers: a file, a page, and a comparison with other ones."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt_jax.commands.flags import check_number
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.files import describe_error, is_there, replace_file

EXAMPLES = 5
# Flags that belong to questions and to CORE, with the value of each when it is not given.
RESULT_FLAGS = {"out": None, "page": None, "examples": EXAMPLES, "compare": None}


def add_result_flags(group) -> None:
    """Adds the flags to a group of argparse."""
    group.add_argument(
        "--out", metavar="FILE.json", help="where the answers to --questions or --core are written"
    )
    group.add_argument(
        "--page", metavar="FILE.html", help="where a page of them is written, which stands alone"
    )
    group.add_argument(
        "--examples",
        type=int,
        default=EXAMPLES,
        metavar="N",
        help="questions of each task that --out and --page show with the model's choice",
    )
    group.add_argument(
        "--compare",
        metavar="FILE.json",
        help="an older --out of the same questions, whose answers are compared with these",
    )


def check_result_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for paths that cannot be written, and for a file that is no --out."""
    check_number("--examples", args.examples, 0)
    for flag in ("out", "page"):
        check_place(f"--{flag}", getattr(args, flag))
        check_no_input(args, flag)
    if args.out and args.page and Path(args.out).resolve() == Path(args.page).resolve():
        raise UsageError(f"--page = {args.page!r}: is the file of --out; name another one")
    if args.compare:
        read_older(args)


def check_no_input(args: argparse.Namespace, flag: str) -> None:
    """Raises UsageError if a file that is to be written is one that the command reads."""
    path = getattr(args, flag)
    if not path or not is_there(path):
        return
    inputs = {"--questions": args.questions, "--core": [args.core], "--compare": [args.compare]}
    for owner, names in inputs.items():
        for name in filter(None, names):
            # A folder is read with all that is in it.
            if Path(path).resolve().is_relative_to(Path(name).resolve()):
                raise UsageError(
                    f"--{flag} = {path!r}: is read by {owner}, and would be overwritten; name "
                    "another file"
                )


def check_place(flag: str, path: str | None) -> None:
    """Raises UsageError if a file that is to be written cannot lie there."""
    if not path:
        return
    if not Path(path).resolve().parent.is_dir():
        raise UsageError(f"{flag} = {path!r}: its folder does not exist")
    # Unlike Path.is_dir, this takes a name that is too long.
    if os.path.isdir(path):
        raise UsageError(f"{flag} = {path!r}: is a folder; name a file")


def read_older(args: argparse.Namespace):
    """The results that --compare names. Raises UsageError if they cannot be read."""
    from gpt_jax.evals import read_results

    if not is_there(args.compare):
        raise UsageError(f"--compare = {args.compare!r}: no such file")
    try:
        return read_results(args.compare)
    except UsageError as error:
        raise UsageError(f"--compare = {error}") from None


def compare_with_older(older, tasks: Sequence, is_core: bool):
    """The Comparison of the answers with `older` results.

    Its tables are empty if no question is in both. That is no error, because the answers may have
    taken hours.
    """
    from gpt_jax.evals import Comparison, compare_core_means, compare_tasks

    compared, apart = compare_tasks(older.tasks, tasks)
    core = compare_core_means(older.tasks.values(), tasks) if is_core else None
    return Comparison(f"{older.checkpoint}, step {older.step}", compared, apart, core)


def list_comparison(comparison, align: Callable[[list[tuple[str, ...]]], list[str]]) -> list[str]:
    """Lines of a comparison, as the page has them."""
    from gpt_jax.evals import format_difference

    lines: list[tuple[str, ...]] = [
        ("task", "metric", "before", "now", "difference", "95 %", "p", "gained", "lost")
    ]
    for one in comparison.tasks:
        cells = format_difference(one.paired.difference)
        counts = (str(one.paired.gained), str(one.paired.lost))
        lines.append((one.task, one.metric, f"{one.old:.4f}", f"{one.new:.4f}", *cells, *counts))
    text = [f"compared with {comparison.name}", *align(lines)]
    if not comparison.tasks:
        text = [f"compared with {comparison.name}: no question was asked both times"]
    if comparison.core:
        value, interval, p = format_difference(comparison.core)
        text.append(f"mean of the shared tasks: {value} ({interval}), p {p}")
    apart = {one.task: one.apart for one in comparison.tasks if one.apart}
    if apart:
        counts = ", ".join(f"{count} of {task}" for task, count in apart.items())
        text.append(f"questions that were asked one time alone, and are not compared: {counts}")
    if comparison.apart:
        text.append(f"tasks that are not compared: {', '.join(comparison.apart)}")
    return text


def comparison_to_json(comparison) -> dict[str, Any]:
    """A comparison as values of JSON."""
    tasks: dict[str, dict] = {}
    for one in comparison.tasks:
        paired = one.paired._asdict() | {"difference": one.paired.difference._asdict()}
        values = {"before": one.old, "now": one.new, "not_shared": one.apart} | paired
        tasks.setdefault(one.task, {})[one.metric] = values
    core = comparison.core._asdict() if comparison.core else None
    return {
        "with": comparison.name,
        "tasks": tasks,
        "core": core,
        "not_compared": list(comparison.apart),
    }


def write_results(args: argparse.Namespace, page, about: dict[str, Any]) -> None:
    """Writes --out and --page. Raises SaveFailed if a disk does not take them."""
    from gpt_jax.evals import make_results_page, to_json

    if args.out:
        values = about | to_json(page.tasks)
        save("--out", args.out, json.dumps(values, ensure_ascii=False, indent=1))
    if args.page:
        save("--page", args.page, make_results_page(page))


def save(flag: str, path: str, text: str) -> None:
    """Writes a file as a whole. Raises SaveFailed."""
    try:
        replace_file(Path(path), text.encode("utf-8", "replace"))
    except OSError as error:
        raise SaveFailed(
            f"{flag}={path}: cannot be written: {describe_error(error)}; what it was to hold is "
            "lost"
        ) from None
