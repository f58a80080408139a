"""`gpt-jax evaluate`: how well a checkpoint predicts text."""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace

from gpt_jax.commands.evaluate_tasks import (
    add_task_flags,
    asks_tasks,
    check_task_flags,
    measure_tasks,
    name_checkpoint,
    without_nan,
)
from gpt_jax.commands.flags import Flags, add_mirror_flag, check_number
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
RATES = ("loss", "perplexity", "bits_per_byte", "accuracy")

Rows = dict[str, dict[str, float]]  # {source: metrics}
More = dict[str, float | str]
Say = Callable[[str], None]


def main(arguments: list[str]) -> None:
    """Raises UsageError for a path or a text that cannot be used.

    Raises NoCheckpoint for a damaged checkpoint.
    """
    args = make_flags().parse_args(arguments)
    check_task_flags(args)
    check_flags(args)
    start_runtime(args)
    end_on_request()
    import jax

    if asks_tasks(args):
        measure_tasks(args, make_say(sys.stderr))
        return
    rows, more, step, directory = measure(args, make_say(sys.stderr))
    if jax.process_index() != 0:
        return
    if args.json:
        sources = {source: without_nan(row) for source, row in rows.items()}
        values = {"checkpoint": directory, "step": step, "sources": sources}
        values |= {"evaluators": more} if more else {}
        emit(write_json(values, 2))
    else:
        emit("\n".join(map(escape, table(rows))))
        for name, value in more.items():
            emit(f"{name}: {value}" if isinstance(value, str) else f"{name}: {value:.4f}")


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax evaluate",
        description="Loss (nats a token), perplexity, bits per byte and accuracy of a checkpoint: "
        "on the held-out text of its run, or on any text. With several sources of a run, the row "
        "all is the mean that the run reports as eval/loss. It is weighted by the sources' parts "
        "of the rows in the phase of the mixture that the step is in. With several --text, all is "
        "their sum, token by token.",
    )
    flags.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir, its checkpoints, one step, a URL of these, or a directory of Hugging Face",
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    add_mirror_flag(flags)
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
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    flags.add_argument(
        "--ignore_miscompiles",
        action="store_true",
        help="go on although this machine's compiler is known to give wrong results",
    )
    add_task_flags(flags)
    add_runtime_flags(flags)
    return flags


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for numbers out of range, and for texts that cannot be told apart."""
    check_number("--batch_size", args.batch_size, 0)
    check_number("--batches", args.batches, 0)
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


def measure(args: argparse.Namespace, say: Say) -> tuple[Rows, More, int, str]:
    """Evaluates the checkpoint.

    Returns ({source: metrics}, what --evaluators give, step, the checkpoints' folder). With
    several sources there is also a row `all`, which the help of the command explains.
    """
    from gpt_jax.evals import average_by_source
    from gpt_jax.metrics import add_sums
    from gpt_jax.run import load_model

    ignored = args.ignore_miscompiles
    loaded = load_model(
        args.checkpoint, args.step, say, ignore_miscompiles=ignored, mirror=args.mirror
    )
    sources, shares = load_text(args, loaded, say) if args.text else load_own_text(loaded, say)
    sums_of = sum_sources(args, loaded, sources)

    rows = {name: as_row(sums) for name, sums in sums_of.items()}
    if len(rows) > 1:
        total = {}
        for sums in sums_of.values():
            total = add_sums(total, sums)
        mean = average_by_source(rows, shares) if shares else {}
        rates = {name: mean[f"eval/{name}"] for name in RATES if mean}
        rows["all"] = as_row(total) | rates

    more = ask(args.evaluators, loaded, sums_of, shares) if args.evaluators else {}
    return rows, more, loaded.step, name_checkpoint(args, loaded)


def sum_sources(args: argparse.Namespace, loaded, sources: dict) -> dict:
    """The held-out Sums of each source, from forward passes over its batches."""
    import jax

    from gpt_jax import sharding
    from gpt_jax.data import make_eval_batches
    from gpt_jax.evals import sum_heldout
    from gpt_jax.run import make_network
    from gpt_jax.train import eval_step

    config = loaded.config
    parts = sharding.row_parts(loaded.mesh)
    batch_size = -(-(args.batch_size or config.eval.batch_size) // parts) * parts
    network = make_network(config.model, config.compute)

    @jax.jit
    def step(params, batch):
        return eval_step(params, {}, batch, network=network, train=config.train)

    sums_of = {}
    with jax.set_mesh(loaded.mesh):
        for name, tokens in sources.items():
            batches = make_eval_batches(
                tokens,
                loaded.tokenizer,
                config.data,
                config.train.seq_len,
                batch_size,
                sharding.process_rows(loaded.mesh, batch_size),
                args.batches,
                f"--text = {name}" if args.text else f"the held-out text of source {name}",
            )
            sums_of[name] = sum_heldout(step, loaded.params, batches, loaded.mesh, batch_size)
    return sums_of


def ask(names: list[str], loaded, sums_of: dict, shares: dict[str, float]) -> More:
    """What the evaluators `names` give for a checkpoint, with the held-out Sums of each source."""
    import jax

    from gpt_jax.data import load_dataset
    from gpt_jax.evals import Evaluation, run_evaluators

    config = loaded.config
    if "questions" in names and not config.eval.questions:
        raise UsageError(
            "--evaluators=questions: the run has no config.eval.questions; name files with "
            "--questions"
        )
    # It was read before, so nothing new can be said of it.
    data = load_dataset(config.data, lambda line: None, loaded.tokenizer)
    knobs = replace(config.eval, evaluators=tuple(names))
    about = config.model, config.compute, knobs, config.seed
    shares = shares or dict.fromkeys(sums_of, 1.0)
    with jax.set_mesh(loaded.mesh):
        numbers, texts = run_evaluators(
            Evaluation(*about, loaded.params, data, loaded.step, lambda: sums_of, shares)
        )
    return numbers | texts


def load_text(args: argparse.Namespace, loaded, say: Say) -> tuple[dict, dict[str, float]]:
    """Returns ({name: tokens} of the texts of --text, no shares)."""
    from gpt_jax.data import load_heldout

    sources = {}
    for text in args.text:
        sources |= load_heldout(text, loaded.config.data, loaded.tokenizer, say)
    return sources, {}


def load_own_text(loaded, say: Say) -> tuple[dict, dict[str, float]]:
    """Returns ({source: held-out tokens} of the run, the share of each source at the step).

    A single source has no shares. Raises UsageError if the text cannot be read, has changed since
    the run, or holds nothing out.
    """
    from gpt_jax.data import load_dataset, make_examples

    config = loaded.config
    try:
        data = load_dataset(config.data, say, loaded.tokenizer)
    except UsageError as error:
        raise UsageError(
            f"the run's own text: {error}; call it from where the run was started, "
            "or give held-out text with --text"
        ) from None
    if data.content != loaded.content:
        raise UsageError(
            f"{config.data.where}: this text has changed since the run, and what it holds out now "
            "may have been trained on; give held-out text with --text"
        )
    if not data.heldout:
        why = "its folder was made by gpt-jax prepare without --eval_fraction"
        if not config.data.eval_fraction:
            why = "config.data.eval_fraction = 0"
        raise UsageError(f"the run held no text out ({why}); give some with --text")

    if len(data.parts) == 1:
        return {"held-out": next(iter(data.heldout.values()))}, {}
    if len(data.heldout) == 1:
        return data.heldout, {}
    examples = make_examples(data, config.data, config.train.seq_len, config.seed)
    return data.heldout, examples.shares(loaded.examples)


def as_row(sums) -> dict[str, float]:
    """The metrics of one source, with the tokens and bytes that they are over."""
    from gpt_jax.evals import compute_heldout_metrics

    return compute_heldout_metrics(sums) | {
        "tokens": float(sums["loss"][1]),
        "bytes": float(sums["bits_per_byte"][1]),
    }


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
