"""`gpt-jax classify`: the label of texts, by a checkpoint that was fine-tuned for that."""

import argparse
import sys
from collections.abc import Callable

from gpt_jax.commands.classify_file import check_file_flags, classify_file, format_row
from gpt_jax.commands.flags import Flags, add_checkpoint_flags
from gpt_jax.commands.output import emit, make_say
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.commands.task_options import parse_task_options
from gpt_jax.errors import UsageError

Say = Callable[[str], None]


def main(arguments: list[str]) -> None:
    """Raises UsageError for a checkpoint, a text or a file that cannot be used.

    Raises NoCheckpoint for a damaged checkpoint.
    """
    args = make_flags().parse_args(arguments)
    if bool(args.text) == bool(args.file):
        raise UsageError("--text and --file: give one of them")
    given = parse_task_options(args.task_options)
    check_file_flags(args)

    start_runtime(args)
    end_on_request()
    import jax

    from gpt_jax.run import load_model

    if jax.process_count() > 1:
        raise UsageError("--num_processes: texts are classified by one process; leave it out")
    say = make_say(sys.stderr)
    loaded = load_model(
        args.checkpoint,
        args.step,
        say,
        ignore_miscompiles=args.ignore_miscompiles,
        mirror=args.mirror,
        base=args.base,
    )
    if args.file:
        classify_file(args, loaded, given, say)
        return
    for found in loaded.classify(args.text, say, **dict(given)):
        emit(format_row(found._asdict()))


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax classify",
        description="The likeliest label of each text, and the probability of each label, as a "
        "JSON object a line. Labels and prompt are those of the corpus that the checkpoint was "
        "trained on, which gpt-jax prepare --task=classify made.",
    )
    add_checkpoint_flags(flags)
    flags.add_argument("--text", nargs="+", action="extend", default=[], help="texts to classify")
    flags.add_argument(
        "--task_options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="prompt= and labels=, in the place of those that the checkpoint carries",
    )
    add_file_flags(flags.add_argument_group("a file"))
    flags.add_argument(
        "--ignore_miscompiles",
        action="store_true",
        help="go on although this machine's compiler is known to give wrong results",
    )
    add_runtime_flags(flags)
    return flags


def add_file_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--file",
        metavar="FILE",
        help="rows to classify: .jsonl .json .csv .tsv .parquet .arrow, perhaps compressed, with "
        "the columns of the prompt",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        help="where the labels go, in the order of the rows: .jsonl or .csv. The same command goes "
        "on with a file that it has begun. Without it they are printed",
    )
    group.add_argument(
        "--label",
        default="",
        metavar="COLUMN",
        help="the column of the right label: accuracy, macro-F1, calibration and the confusion of "
        "labels are measured and printed; needs --out",
    )
    group.add_argument(
        "--page", metavar="FILE.html", help="a page of what is measured; needs --label"
    )
    group.add_argument(
        "--json", action="store_true", help="print what is measured as one JSON object"
    )
    group.add_argument(
        "--on_error", default="stop", help="a row that cannot be read: stop, or skip (counted)"
    )
