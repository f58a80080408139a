"""`gpt-jax card`: what a config or a checkpoint can do, checked here and written on one page."""

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from gpt_jax.commands.config_file import load_config
from gpt_jax.commands.flags import Flags, add_mirror_flag, check_number
from gpt_jax.commands.output import emit, make_say, write_json
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, replace_file

CPU_DEVICES = 8


def make_flags() -> Flags:
    """The flags of `gpt-jax card`. With --config every other argument is an override."""
    flags = Flags(
        prog="gpt-jax card",
        description="Checks what a config can do, on a tiny shape that keeps its features: that it "
        "trains, resumes and reshards, that meshes agree with one device, decoding, scores, and "
        "the way to other projects and back. It also plans the config's own shape. "
        "Exit code 0: nothing fails; 2: a check fails.",
    )
    what = flags.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="a file in configs/, and its variant")
    what.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a workdir, its checkpoints, or one step; a small one is checked with its own weights",
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    add_mirror_flag(flags)
    flags.add_argument(
        "--checks", nargs="+", default=[], metavar="NAME", help="make these checks alone"
    )
    flags.add_argument(
        "--out", metavar="FILE", help="where the page goes; without it it is printed"
    )
    flags.add_argument("--json", action="store_true", help="write JSON instead of the page")
    add_runtime_flags(flags)
    flags.set_defaults(cpu_devices=CPU_DEVICES)
    return flags


def main(arguments: list[str]) -> None:
    """Writes the card.

    Raises UsageError for a mistake in the arguments. After the card it also raises UsageError if a
    check fails.
    """
    args, overrides = make_flags().parse_known_args(arguments)
    check_flags(args, overrides)
    start_runtime(args)
    end_on_request()
    from gpt_jax.card import format_page, list_failed, to_data

    data = to_data(make_card_of(args, overrides))
    text = write_json(data, 2) if args.json else format_page(data).rstrip("\n")
    if args.out:
        write_out(args.out, text)
    else:
        emit(text)

    failed = list_failed(data)
    if failed:
        raise UsageError(f"{data['name']}: fails {', '.join(failed)}; the card has the figures")


def check_flags(args: argparse.Namespace, overrides: list[str]) -> None:
    """Raises UsageError for flags that do not go together, or that cannot be used."""
    check_number("--step", args.step, 0)
    if args.checkpoint is not None and overrides:
        raise UsageError(
            f"{overrides[0]}: a checkpoint has its own config; leave it out, or use --config"
        )
    if args.config and args.step:
        raise UsageError(f"--step={args.step}: is for --checkpoint; leave it out")
    if args.num_processes > 1 or args.distributed:
        raise UsageError("--num_processes: a card is made by one process; leave it out")
    if args.out:
        place = Path(args.out)
        if place.is_dir() or not place.parent.is_dir():
            raise UsageError(f"--out={args.out}: name a file in a folder that is there")

    from gpt_jax.card import CHECKS

    unknown = [name for name in args.checks if name not in CHECKS]
    if unknown:
        raise UsageError(f"--checks={unknown[0]}: no such check; choose of {', '.join(CHECKS)}")


def make_card_of(args: argparse.Namespace, overrides: list[str]):
    """The card of what the flags name."""
    from gpt_jax.card import CHECKS, make_card, open_subject
    from gpt_jax.run import find_checkpoint, peek_checkpoint, read_config

    say = make_say(sys.stderr)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = ""
    if args.checkpoint is None:
        name = args.config
        row = load_config(args.config, overrides)
    else:
        name = args.checkpoint
        # Its files are verified here. The run that starts from it reads them again.
        directory, step = find_checkpoint(args.checkpoint, args.step, say, args.mirror)
        row = read_config(peek_checkpoint(directory, step)[0], directory, step)
        source = f"{directory}@{step}"
    with tempfile.TemporaryDirectory(prefix="gpt_jax_card_") as folder:
        subject = open_subject(name, row, Path(folder), say, source)
        return make_card(subject, date, args.checks or tuple(CHECKS))


def write_out(path: str, text: str) -> None:
    """Raises UsageError if the file cannot be written."""
    try:
        replace_file(Path(path), (text + "\n").encode())
    except OSError as error:
        raise UsageError(f"--out={path}: {describe_error(error)}; name another file") from None
