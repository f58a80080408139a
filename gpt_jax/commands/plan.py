"""`gpt-jax plan`: whether a run fits on hardware that is not here, and how fast it could be."""

import argparse
import json
import math
import os
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.commands.compiling import compile_outside, need_compiler
from gpt_jax.commands.config_file import load_config, split_overrides
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.commands.runtime import end_on_request
from gpt_jax.errors import UsageError


def make_flags() -> Flags:
    """The flags of `gpt-jax plan`. Every other argument is an override of the config."""
    flags = Flags(
        prog="gpt-jax plan",
        description="Preflight: memory, collectives, step time and MFU of a config on a machine "
        "that need not exist. Exit code 0: it fits; 2: it does not fit, or cannot run.",
    )
    flags.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="a file in configs/, and its variant"
    )
    flags.add_argument(
        "--topology",
        required=True,
        metavar="NAME:SHAPE",
        help="the machine, as in v5p:4x4x4 or h100:64",
    )
    flags.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="slices of that shape, over the data centre network (TPU)",
    )
    add_work_flags(flags)
    flags.add_argument(
        "--data_tokens", type=float, default=0, help="tokens of the data, to count epochs"
    )
    flags.add_argument(
        "--write_bandwidth",
        type=float,
        default=1e9,
        metavar="B",
        help="bytes a second that a host writes to storage",
    )
    flags.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further compiler option, as in --config.compute.compiler_options",
    )
    flags.add_argument("--keep_hlo", metavar="FILE", help="where the compiled program's text goes")
    flags.add_argument("--json", action="store_true", help="print JSON")

    # The command starts itself to compile. Here it puts what the compiler made.
    flags.add_argument("--inside", help=argparse.SUPPRESS)
    return flags


def add_work_flags(flags: Flags) -> None:
    """Adds the flags that say what is tried and compiled."""
    flags.add_argument(
        "--compile",
        type=int,
        nargs="?",
        const=1,
        metavar="K",
        help="compile the train step for it, too; with --search the best K (minutes each)",
    )
    flags.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="try meshes, remat policies and microbatches, and show the best N",
    )


def main(arguments: list[str]) -> None:
    """Prints a plan.

    Raises UsageError for a mistake in the arguments. After the report it also raises UsageError if
    the config does not fit or cannot run.
    """
    flags = make_flags()
    end_on_request()  # The compiler's process ends together with this one.
    # These stand for the flags if they cannot even be parsed.
    args = argparse.Namespace(json="--json" in arguments, topology=None, inside=None)
    try:
        args, rest = flags.parse_known_args(arguments)
        trouble = run(args, rest)
    except UsageError as error:
        if args.json and not args.inside:
            refuse(args.topology, error)
        raise
    if trouble:
        raise UsageError(trouble)


def refuse(topology: str | None, error: UsageError) -> None:
    """Prints a refusal as JSON.

    Raises UsageError if it cannot be printed; the message has both reasons.
    """
    refusal = {"topology": topology, "fits": False, "problems": [str(error)]}
    try:
        emit(json.dumps(refusal, indent=2))
    except UsageError as unwritten:
        raise UsageError(f"{error}; and {unwritten}") from None


def run(args: argparse.Namespace, rest: list[str]) -> str:
    """Prints the report, and returns what is wrong with the run ("" if it fits and runs).

    Raises UsageError if there is nothing to report.
    """
    check_flags(args)
    import jax

    # Nothing here needs an accelerator, and a run may be using it.
    jax.config.update("jax_platforms", "cpu")
    from gpt_jax.plan import compile_job, parse_topology

    topology = parse_topology(args.topology, args.slices)
    overrides, notes = complete_overrides(args, rest, topology)
    config = load_config(args.config, overrides)
    if args.compile:
        need_compiler(topology)
    if args.inside:
        keep = Path(args.keep_hlo).write_text if args.keep_hlo else None
        compiled = compile_job(config, topology, keep)
        Path(args.inside).write_text(json.dumps(compiled))
        return ""
    return report(args, overrides, config, topology, notes)


def complete_overrides(args, rest: list[str], topology) -> tuple[list[str], list[str]]:
    """Returns (the overrides in `rest` and those that flags stand for, notes about them).

    Raises UsageError if `rest` has anything but overrides, or if they make no config.
    """
    from gpt_jax.plan import is_searched

    overrides = [f"--config.{key}={text}" for key, text in split_overrides(rest)]
    config = load_config(args.config, overrides)
    notes = []
    if args.search:
        searched = [text for text in overrides if is_searched(text)]
        notes += [f"{text}: --search chooses that itself" for text in searched]

    if topology.slices > 1 and set(configs.cross_slice(config.mesh).values()) == {1}:
        override = f"--config.mesh.dcn_data={topology.slices}"
        overrides.append(override)
        notes.append(
            f"--slices={topology.slices}: no dcn_ size is set, so {override} is taken; "
            "give it to train too"
        )
    if args.option:
        options = (*config.compute.compiler_options, *args.option)
        overrides.append(f"--config.compute.compiler_options={options}")
    return overrides, notes


def report(args, overrides: list[str], config, topology, notes: list[str]) -> str:
    """Prints the report, and returns what is wrong with the run ("" if it fits and runs)."""
    from gpt_jax.plan import (
        CommandLine,
        Request,
        is_searched,
        make_data,
        make_plan,
        write_lines,
    )

    fixed = [text for text in overrides if not is_searched(text)]
    request = Request(
        config,
        topology,
        notes,
        CommandLine(args.config, fixed, load_config(args.config, fixed)),
        search=args.search or 0,
        programs=args.compile or 0,
        data_tokens=args.data_tokens,
        write_bandwidth=args.write_bandwidth,
    )

    def compile_step(changes: list[str]) -> dict:
        return compile_outside(args, [*overrides, *changes])

    plan = make_plan(request, compile_step if args.compile else None)
    if args.json:
        emit(json.dumps(make_data(plan), indent=2))
    else:
        emit("\n".join(write_lines(plan)))
    return plan.trouble


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for a flag out of its range, or without the flag that it needs."""
    for name in ("compile", "search"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value}: expected 1 or more")

    if args.data_tokens and not 1 <= args.data_tokens < math.inf:
        raise UsageError(
            f"--data_tokens={args.data_tokens:g}: expected 1 or more tokens, or 0 if nobody knows"
        )
    if not args.search and (args.compile or 0) > 1:
        raise UsageError(
            f"--compile={args.compile}: without --search there is one program to compile; "
            "add --search, or leave the number out"
        )
    if args.keep_hlo is not None:
        check_keep(args)
    if not 1 <= args.write_bandwidth < math.inf:
        raise UsageError(
            f"--write_bandwidth={args.write_bandwidth:g}: "
            "expected 1 byte a second or more, as in 1e9"
        )
    check_options(args)


def check_options(args: argparse.Namespace) -> None:
    """Raises UsageError for an --option that nobody reads, or that is no NAME=VALUE."""
    if args.option and not args.compile:
        raise UsageError(
            f"--option={args.option[0]}: is for the compiler; add --compile, or leave it out"
        )
    for option in args.option:
        name, equals, _ = option.partition("=")
        if not (name and equals):
            raise UsageError(f"--option={option}: expected NAME=VALUE")


def check_keep(args: argparse.Namespace) -> None:
    """Raises UsageError for a --keep_hlo that gets no program, or cannot be written."""
    if not args.compile:
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: there is no program without --compile; "
            "add it, or leave this out"
        )
    if args.search:
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: --search compiles one program after the other; "
            "plan the one it finds without --search"
        )

    file = Path(args.keep_hlo)
    place = file if file.exists() else file.parent
    if file.is_dir() or not file.parent.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: cannot be written; "
            "name a file in a folder that is there and yours"
        )
