"""`gpt-jax evaluate`: how well a checkpoint predicts text."""

import json
import math
import sys
from functools import partial
from pathlib import Path

from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit, make_say
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.errors import UsageError

COLUMNS = (
    ("loss", "{:.4f}"),
    ("perplexity", "{:.3f}"),
    ("bits_per_byte", "{:.4f}"),
    ("accuracy", "{:.4f}"),
    ("tokens", "{:,.0f}"),
    ("bytes", "{:,.0f}"),
)
RATES = ("loss", "perplexity", "bits_per_byte", "accuracy")


def main(arguments: list[str]) -> None:
    """Raises UsageError for a path or text that cannot be used, NoCheckpoint for a damaged
    checkpoint."""
    flags = Flags(
        prog="gpt-jax evaluate",
        description="Loss (nats a token), perplexity, bits per byte and accuracy of "
        "a checkpoint: on the held-out text of its run, or on any text. With several sources of a "
        "run, all "
        "is the mean that the run reports as eval/loss: weighted by the sources' parts of the rows "
        "in the "
        "stage of the mixture that the step is in. With several --text, all is their sum, token by "
        "token.",
    )
    flags.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a workdir, its checkpoints, or one step"
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    flags.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files, directories or globs, each a row of the table, or a folder made by gpt-jax "
        "prepare, of which what it holds out is measured; none: the run's held-out text",
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
    add_runtime_flags(flags)
    args = flags.parse_args(arguments)
    if args.batch_size < 0 or args.batches < 0:
        raise UsageError("--batch_size and --batches: expected 0 or more")
    twice = sorted({text for text in args.text if args.text.count(text) > 1})
    if twice or "all" in args.text:
        raise UsageError(
            f"--text={(twice or ['all'])[0]}: "
            + ("is given twice" if twice else "is the name of the sum; write ./all")
        )
    start_runtime(args)
    end_on_request()
    import jax

    first = jax.process_index() == 0
    say = make_say(sys.stderr)
    rows, step, directory = measure(args, say)
    if first and args.json:
        strict = {
            source: {name: value if math.isfinite(value) else None for name, value in row.items()}
            for source, row in rows.items()
        }  # JSON has no NaN
        emit(
            json.dumps(
                {"checkpoint": str(directory), "step": step, "sources": strict},
                ensure_ascii=False,
                indent=2,
            )
        )
    elif first:
        emit("\n".join(table(rows)))


def measure(args, say) -> tuple[dict[str, dict[str, float]], int, Path]:
    """({source: metrics}, step, directory); with several sources `all` besides, as main's help
    defines it."""
    import jax

    from gpt_jax import sharding
    from gpt_jax.data import load_dataset, load_heldout, make_eval_batches, make_examples
    from gpt_jax.evals import average_by_source, sum_heldout
    from gpt_jax.metrics import add_sums
    from gpt_jax.run import load_model, make_network
    from gpt_jax.train import eval_step

    loaded = load_model(args.checkpoint, args.step, say, ignore_miscompiles=args.ignore_miscompiles)
    config, mesh = loaded.config, loaded.mesh
    if args.text:
        sources = {
            name: tokens
            for text in args.text
            for name, tokens in load_heldout(text, config.data, loaded.tokenizer, say).items()
        }
    else:
        try:
            data = load_dataset(config.data, say, loaded.tokenizer)
        except UsageError as error:
            raise UsageError(
                f"the run's own text: {error}; call it from where the run was started, or give "
                "held-out "
                "text with --text"
            ) from None
        if data.content != loaded.content:
            raise UsageError(
                f"{config.data.where}: this text has changed since the run, and "
                "what it holds out now may have been trained on; give held-out text with --text"
            )
        if not data.heldout:
            why = (
                "config.data.eval_fraction = 0"
                if not config.data.eval_fraction
                else "its folder was made by gpt-jax prepare without --eval_fraction"
            )
            raise UsageError(f"the run held no text out ({why}); give some with --text")
        sources = (
            data.heldout if len(data.parts) > 1 else {"held-out": next(iter(data.heldout.values()))}
        )
    shards = sharding.row_parts(mesh)
    batch_size = -(-(args.batch_size or config.eval.batch_size) // shards) * shards
    step = jax.jit(
        partial(eval_step, network=make_network(config.model, config.compute), train=config.train)
    )
    found, total, shares = {}, {}, {}
    if not args.text and len(sources) > 1:
        examples = make_examples(data, config.data, config.train.seq_len, config.seed)
        shares = examples.shares(loaded.step * config.train.batch_size)
    with jax.set_mesh(mesh):
        for name, tokens in sources.items():
            batches = make_eval_batches(
                tokens,
                loaded.tokenizer,
                config.data,
                config.train.seq_len,
                batch_size,
                sharding.process_rows(mesh, batch_size),
                args.batches,
                f"--text = {name}" if args.text else f"the held-out text of source {name}",
            )
            sums = sum_heldout(step, loaded.params, batches, mesh, batch_size)
            found[name], total = sums, add_sums(total, sums)
    rows = {name: as_row(sums) for name, sums in found.items()}
    if len(rows) > 1:
        mean = average_by_source(rows, shares) if shares else {}
        rows["all"] = as_row(total) | {name: mean[f"eval/{name}"] for name in RATES if mean}
    return rows, loaded.step, loaded.directory


def as_row(sums) -> dict[str, float]:
    """Metrics of one source, with the tokens and bytes they are over."""
    from gpt_jax.evals import compute_heldout_metrics

    return compute_heldout_metrics(sums) | {
        "tokens": float(sums["loss"][1]),
        "bytes": float(sums["bits_per_byte"][1]),
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Aligned lines: a header, then a source a line."""
    cells = [["source", *(name for name, _ in COLUMNS)]]
    cells += [
        [source, *(how.format(row[name]) for name, how in COLUMNS)] for source, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=False)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=False))
        )
        for line in cells
    ]
