"""`gpt-jax evaluate`: how well a checkpoint predicts text."""

import argparse
import math
import sys
from collections.abc import Callable

from gpt_jax.commands.evaluate_steps import (
    add_step_flags,
    asks_steps,
    check_step_flags,
    measure_steps,
)
from gpt_jax.commands.evaluate_tasks import (
    add_task_flags,
    asks_tasks,
    check_task_flags,
    measure_tasks,
)
from gpt_jax.commands.evaluate_text import Measured, Rows, TextMeter
from gpt_jax.commands.flags import Flags, add_checkpoint_flags, check_number
from gpt_jax.commands.output import emit, make_say, write_json
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.config import EVALUATORS
from gpt_jax.errors import UsageError, escape
from gpt_jax.files import is_there

# The columns of the table, and how a number is written in each.
COLUMNS = (
    ("loss", "{:.4f}"),
    ("perplexity", "{:.3f}"),
    ("bits_per_byte", "{:.4f}"),
    ("accuracy", "{:.4f}"),
    ("tokens", "{:,.0f}"),
    ("bytes", "{:,.0f}"),
)

Say = Callable[[str], None]


def main(arguments: list[str]) -> None:
    """Raises UsageError for a path or a text that cannot be used.

    Raises NoCheckpoint for a damaged checkpoint.
    """
    args = make_flags().parse_args(arguments)
    check_task_flags(args)
    check_flags(args)
    check_step_flags(args)
    start_runtime(args)
    end_on_request()
    import jax

    if asks_steps(args):
        measure_steps(args, make_say(sys.stderr))
        return
    if asks_tasks(args):
        measure_tasks(args, make_say(sys.stderr))
        return
    measured = measure(args, make_say(sys.stderr))
    if jax.process_index() != 0:
        return
    if args.json:
        emit(write_json(measured.to_json(), 2))
    else:
        emit("\n".join(map(escape, table(measured.sources | measured.sets))))
        for name, value in measured.more.items():
            emit(f"{name}: {value}" if isinstance(value, str) else f"{name}: {value:.4f}")


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax evaluate",
        description="Loss (nats a token), perplexity, bits per byte and accuracy of a checkpoint: "
        "on the held-out text of its run, or on any text. With several sources of a run, the row "
        "all is the mean that the run reports as eval/loss. It is weighted by the sources' parts "
        "of the rows in the phase of the mixture that the step is in. With several --text, all is "
        "their sum, token by token. Each set of the run's config.eval.sets has a row of its own.",
    )
    add_checkpoint_flags(flags)
    add_text_flags(flags)
    flags.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    flags.add_argument(
        "--ignore_miscompiles",
        action="store_true",
        help="go on although this machine's compiler is known to give wrong results",
    )
    add_step_flags(flags)
    add_task_flags(flags)
    add_runtime_flags(flags)
    return flags


def add_text_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files, directories or globs, each a row of the table. Of a folder made by gpt-jax "
        "prepare, the held-out text is measured. Without --text: the run's held-out text",
    )
    flags.add_argument(
        "--evaluators",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more to measure on the run's held-out text, as config.eval.evaluators names it, such "
        "as xz",
    )
    flags.add_argument(
        "--batch_size", type=int, default=0, help="rows at once; 0: as the run evaluated"
    )
    flags.add_argument(
        "--batches", type=int, default=0, help="batches of each source; 0: all of it"
    )
    flags.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens by which rows of text move on: each token is predicted once, and sees the "
        "row's length less N or more of its text; 0: rows that share no token; by default what "
        "the run's config.eval.stride says",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for numbers out of range, and for texts that cannot be told apart."""
    check_number("--batch_size", args.batch_size, 0)
    check_number("--batches", args.batches, 0)
    if args.stride is not None:
        check_number("--stride", args.stride, 0)
    repeated = sorted({text for text in args.text if args.text.count(text) > 1})
    if repeated:
        raise UsageError(f"--text={repeated[0]}: is given twice")
    if "all" in args.text:
        raise UsageError("--text=all: is the name of the sum; write ./all")
    missing = [text for text in args.text if not may_be_there(text)]
    if missing:
        raise UsageError(f"--text = {missing[0]!r}: no such file or directory")
    if args.evaluators and args.text:
        raise UsageError("--evaluators: measure the run's own held-out text; leave out --text")
    unknown = [name for name in args.evaluators if name not in EVALUATORS]
    if unknown:
        raise UsageError(f"--evaluators={unknown[0]}: choose among {', '.join(EVALUATORS)}")


def may_be_there(text: str) -> bool:
    """Whether a path of --text can exist. It is asked before the weights are read.

    Object stores, hubs and the word stdlib are looked up later.
    """
    return "://" in text or text == "stdlib" or is_there(text)


def measure(args: argparse.Namespace, say: Say) -> Measured:
    """Evaluates the checkpoint on text."""
    from gpt_jax.run import load_model

    ignored = args.ignore_miscompiles
    loaded = load_model(
        args.checkpoint,
        args.step,
        say,
        ignore_miscompiles=ignored,
        mirror=args.mirror,
        base=args.base,
    )
    return TextMeter(args, say).measure(loaded)


def table(rows: Rows) -> list[str]:
    """Aligned lines: a header, then a source a line. A rate over nothing is a dash."""
    lines = [["source", *(name for name, _ in COLUMNS)]]
    for source, row in rows.items():
        cells = ["-" if math.isnan(row[name]) else form.format(row[name]) for name, form in COLUMNS]
        lines.append([source, *cells])

    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for source, *numbers in lines:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        aligned.append("  ".join([source.ljust(widths[0]), *cells]))
    return aligned
