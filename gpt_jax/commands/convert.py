"""`gpt-jax convert`: models of other projects to checkpoints of ours, and back."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gpt_jax.commands.flags import Flags, add_base_flag, add_mirror_flag, check_number
from gpt_jax.commands.output import emit, make_say
from gpt_jax.errors import UsageError

FORMATS = ("hf", "native", "peft")
DTYPES = ("float32", "bfloat16", "float16")
GIGABYTE = 1e9


def main(arguments: list[str]) -> None:
    """Raises UsageError for a model or a place that cannot be used.

    Raises NoCheckpoint for a damaged checkpoint, and SaveFailed if the disk does not take it.
    """
    args = make_flags().parse_args(arguments)
    check_flags(args)
    import jax

    # Nothing here needs an accelerator, and a run may be using it.
    jax.config.update("jax_platforms", "cpu")
    convert(args)


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax convert",
        description="Converts a model: a directory of Hugging Face to a checkpoint, or a "
        "checkpoint to a directory of Hugging Face. It holds two tensors at a time.",
    )
    flags.add_argument(
        "--from",
        dest="source",
        nargs="+",
        required=True,
        metavar="PATH",
        help="a directory with config.json and safetensors files, a .bin of llama2.c, a .pt of "
        "nanoGPT, a .weights.h5 of Keras, or a workdir, its checkpoints, one step, or a URL of "
        "these. Several are averaged",
    )
    flags.add_argument(
        "--to",
        required=True,
        metavar="DIR",
        help="a new directory, or its URL in an object store, as in gs://BUCKET/MODEL",
    )
    flags.add_argument(
        "--format",
        choices=FORMATS,
        help="what is written; without it a checkpoint becomes hf, and all else native. Adapters "
        "are merged, but for peft, which writes them alone",
    )
    flags.add_argument(
        "--family", default="", help="the family that is written; without it the first that fits"
    )
    flags.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="the dtype of tensors of format hf"
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    add_mirror_flag(flags)
    add_base_flag(flags)
    add_reading_flags(flags)
    return flags


def add_reading_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[],
        metavar="W",
        help="the shares of several --from in their mean, in the same order; without it equal ones",
    )
    flags.add_argument(
        "--tokenizer",
        default="",
        metavar="SPEC",
        help="the tokenizer of a directory that has none: bytes, or a path",
    )
    flags.add_argument(
        "--ignore_keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of config.json that are known not to change the model",
    )
    flags.add_argument(
        "--allow_nonfinite",
        action="store_true",
        help="write weights that are NaN or infinite as they are, with a line; without it they are "
        "refused",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together."""
    check_number("--step", args.step, 0)
    if not args.to or "" in args.source:
        raise UsageError("--from and --to: an empty path names nothing")
    target = Path(args.to).resolve()
    for source in map(Path, args.source):
        if source.resolve() in (target, *target.parents):
            raise UsageError(f"--to={args.to}: lies in {source}; name a directory outside of it")
    if args.weights and len(args.weights) != len(args.source):
        raise UsageError(
            f"--weights: {len(args.weights)} shares for {len(args.source)} models; give one each"
        )
    for share in args.weights:
        check_number("--weights", share, 0, 1e9)
    if args.weights and sum(args.weights) == 0:
        raise UsageError("--weights: all shares are 0; give one above")


def convert(args: argparse.Namespace) -> None:
    """Opens, averages, and writes."""
    from gpt_jax.run import opening_target

    say = make_say(sys.stderr)
    with opening_target(args.to, args.mirror, say) as target:
        name, wanted = write(args, target, say)
    emit(f"{name} is now {args.to} ({wanted})")


def write(args: argparse.Namespace, target: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Writes the model to a folder. Gives its name, and the format."""
    from gpt_jax.interop import describe_left_out, is_foreign, refuse_nonfinite, write_directory
    from gpt_jax.run import average, open_model, write_native

    if args.format == "peft":
        return write_adapter(args, target, say), "peft"
    ignored = tuple(args.ignore_keys)
    origins = [
        open_model(path, args.step, say, args.tokenizer, ignored, args.mirror, args.base)
        for path in args.source
    ]
    shares = args.weights or [1.0] * len(origins)
    origin = origins[0]
    if len(origins) > 1:
        origin = average(origins, [share / sum(shares) for share in shares])

    wanted = args.format or ("native" if is_foreign(args.source[0]) else "hf")
    for flag, default in (("family", ""), ("dtype", "float32")):
        if wanted == "native" and getattr(args, flag) != default:
            raise UsageError(f"--{flag}={getattr(args, flag)}: is for --format=hf; leave it out")
    meet = say if args.allow_nonfinite else refuse_nonfinite
    if wanted == "hf":
        line = describe_left_out(origin)
        if line:
            say(line)
        write_directory(origin, target, args.family, args.dtype, meet_nonfinite=meet)
    else:
        write_native(origin, target, say, meet)
    return origin.name, wanted


def write_adapter(args: argparse.Namespace, target: Path, say: Callable[[str], None]) -> str:
    """Writes the adapter of one checkpoint for `peft`. Gives its name.

    Raises UsageError for flags that are of no use there.
    """
    from gpt_jax.run import export_adapters

    if len(args.source) > 1:
        raise UsageError(f"--from: {len(args.source)} models, and --format=peft takes one")
    for flag, default in (
        ("dtype", "float32"),
        ("tokenizer", ""),
        ("ignore_keys", []),
        ("allow_nonfinite", False),
    ):
        if getattr(args, flag) != default:
            raise UsageError(f"--{flag}: is not for --format=peft; leave it out")
    name = export_adapters(
        args.source[0], args.step, target, say, args.family, args.mirror, args.base
    )
    return f"the adapter of {name}"
