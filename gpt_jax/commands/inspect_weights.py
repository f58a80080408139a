"""`gpt-jax inspect --checkpoint`: what a checkpoint holds, alone or beside another one."""

import argparse
import sys
from collections.abc import Iterator

from gpt_jax.commands.evaluate_tasks import without_nan
from gpt_jax.commands.flags import add_base_flag, add_mirror_flag, check_number
from gpt_jax.commands.output import emit, make_say, write_json
from gpt_jax.errors import NoCheckpoint, UsageError

# The columns of both tables: title, width, and how a value is written.
MEASURED = (("norm", 12, "{:.5g}"), ("largest", 12, "{:.5g}"))
APART = (("largest", 12, "{:.4g}"), ("relative", 12, "{:.4g}"))


def add_weight_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="show the weights of a checkpoint or of a model of Hugging Face: shapes, bytes, "
        "norms; a checkpoint may be at a URL",
    )
    add_mirror_flag(flags)
    add_base_flag(flags)
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    flags.add_argument(
        "--diff", metavar="DIR", help="show how far the weights of another one are from them"
    )
    flags.add_argument(
        "--diff_step", type=int, default=0, help="which step of --diff; 0: the newest valid one"
    )
    flags.add_argument(
        "--verify",
        action="store_true",
        help="compare every file of every step with the digests that were saved with it",
    )


def inspect_weights(args: argparse.Namespace) -> None:
    """Raises UsageError for a path that cannot be used, and NoCheckpoint for damage."""
    check_number("--step", args.step, 0)
    check_number("--diff_step", args.diff_step, 0)
    if args.verify and (args.diff or args.step or args.json or args.base):
        raise UsageError("--verify: looks at every step, and goes with --checkpoint alone")
    if args.diff_step and not args.diff:
        raise UsageError(f"--diff_step={args.diff_step}: needs --diff")
    import jax

    # Nothing here needs an accelerator, and a run may be using it.
    jax.config.update("jax_platforms", "cpu")
    if args.verify:
        verify(args.checkpoint)
    elif args.diff:
        show_difference(args)
    else:
        show_weights(args)


def verify(path: str) -> None:
    """A line for each step. Raises NoCheckpoint if one of them is damaged."""
    from gpt_jax.interop import is_foreign

    if is_foreign(path):
        raise UsageError(f"--verify: {path} is no checkpoint of ours, and has no digests")
    damaged = []
    for step, damage in find_all_damage(path):
        emit(f"step {step}: {damage or 'whole'}")
        damaged += [str(step)] if damage else []
    if damaged:
        raise NoCheckpoint(f"{path}: damaged: step {', '.join(damaged)}")


def find_all_damage(path: str) -> Iterator[tuple[int, str]]:
    """(step, its damage or "") of every step at a path or a URL. Raises UsageError for none."""
    from gpt_jax.run import META_SCHEMA, find_remote_damage
    from gpt_jax.train import find_damage, find_steps

    if "://" in path:
        yield from find_remote_damage(path)
        return
    directory, steps = find_steps(path)
    if not steps:
        raise UsageError(f"--checkpoint={path}: no step is there")
    for step in steps:
        yield step, find_damage(directory / str(step), META_SCHEMA)


def show_weights(args: argparse.Namespace) -> None:
    """Prints what the model is, then a line for each parameter."""
    from gpt_jax.interop import describe_nonfinite, is_foreign, watch
    from gpt_jax.run import describe_entry, measure, open_model

    say = make_say(sys.stderr)
    origin = open_model(args.checkpoint, args.step, say, mirror=args.mirror, base=args.base)
    origin, nonfinite = watch(origin)
    rows = list(measure(origin))
    tokenizer = origin.tokenizer.name if origin.tokenizer else None
    facts = {
        "checkpoint": origin.name,
        "parameters": sum(row.size // 4 for row in rows),
        "bytes": sum(row.size for row in rows),
        "tokenizer": tokenizer,
        **origin.facts,
    }
    # The files of a foreign model would be read as a whole for their digests.
    past = [] if is_foreign(args.checkpoint) else origin.lineage()[:-1]
    if args.json:
        tensors = [without_nan(row._asdict()) for row in rows]
        emit(
            write_json(
                {**facts, "lineage": past, "nonfinite": dict(nonfinite), "tensors": tensors}, 2
            )
        )
        return
    for name, value in facts.items():
        emit(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    for entry in past:
        emit(f"came from: {describe_entry(entry)}")
    if nonfinite:
        emit(describe_nonfinite(nonfinite))
    print_table(rows, MEASURED)


def show_difference(args: argparse.Namespace) -> None:
    """Prints a line for each parameter that differs, then how many do."""
    from gpt_jax.run import open_model, subtract

    say = make_say(sys.stderr)
    first = open_model(args.checkpoint, args.step, say, mirror=args.mirror, base=args.base)
    second = open_model(args.diff, args.diff_step, say, mirror=args.mirror)
    rows = list(subtract(first, second))
    different = [row for row in rows if not row.is_equal]
    if args.json:
        emit(write_json([without_nan(row._asdict()) for row in rows], 2))
        return
    print_table(different, APART)
    emit(f"{len(different)} of {len(rows)} parameters differ")


def print_table(rows: list, columns) -> None:
    """Prints rows under their titles. The first columns are path and shape."""
    width = max([len(row.path) for row in rows], default=0)
    titles = "".join(f"{title:>{size}}" for title, size, _ in columns)
    if rows:
        emit(f"{'':{width}}  {'shape':<18}{titles}")
    for row in rows:
        values = "".join(
            f"{form.format(getattr(row, name)):>{size}}" for name, size, form in columns
        )
        shape = "x".join(map(str, row.shape))
        emit(f"{row.path:{width}}  {shape:<18}{values}")
