"""`gpt-jax prepare`: raw text to a folder of token shards, and a look into such a folder."""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpt_jax.commands.display import Display
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.commands.stopping import interrupt_once
from gpt_jax.commands.task_options import parse_task_options
from gpt_jax.errors import DataError, Stopped, UsageError, escape
from gpt_jax.files import is_there

NAMED_PATH = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)  # NAME=PATH
MISNAMED_PATH = re.compile(r"([^/=?*]*)=")  # an attempt at it
SOURCE = "text"  # the source of paths without a name
LISTS = ("--input", "--filters", "--encodings", "--task_options")  # flags that take several values
# Flags that are numbers, with the least and the most.
LIMITS = {
    "eval_fraction": (0.0, 0.9),
    "piece_mb": (0.0, 1e6),
    "tokenizer_mb": (1e-6, 1e9),
    "workers": (0, 4096),
}


def main(arguments: list[str]) -> None:
    """Raises UsageError for input, settings and folders that cannot be used.

    Raises DataError for damaged files, and PeerFailed if workers are lost.
    """
    args = make_flags().parse_args([part for text in arguments for part in split_flag(text)])
    looks = [name for name in ("inspect", "verify") if getattr(args, name)]
    if looks and (args.input or args.output or len(looks) > 1):
        raise UsageError(f"--{looks[0]}={getattr(args, looks[0])}: is given alone")

    if args.inspect:
        look_inside(Path(args.inspect).expanduser())
    elif args.verify:
        verify(Path(args.verify).expanduser())
    else:
        run(args)


def split_flag(text: str) -> list[str]:
    """`--input=a` as `--input` and `a`, for flags that take several values.

    People type `--input=a b`, and argparse takes no further values after that form.
    """
    flag, equals, value = text.partition("=")
    return [flag, value] if equals and flag in LISTS else [text]


class ReplaceDefault(argparse.Action):
    """Collects the values of a flag. The first ones take the place of the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        earlier = [] if before is self.default else list(before)
        setattr(namespace, self.dest, [*earlier, *(values or [])])


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax prepare",
        description="Read text, filter it, and write token shards that --config.data.path takes. "
        "After a stop at any moment the same command carries on where it was. When all is "
        "finished it says so after a look at the files' sizes; --verify checks their content. "
        "Memory: for each worker some 200 MB, a few times the largest document, and 32 bytes a "
        "document of a unit.",
    )
    flags.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help="files, directories, globs, URLs, hf://name[:config][@split][#revision]; "
        "NAME names their source",
    )
    flags.add_argument(
        "--output", metavar="DIR", help="a new folder, or one that an earlier call began"
    )
    flags.add_argument("--inspect", metavar="DIR", help="print what is inside a finished folder")
    flags.add_argument(
        "--verify", metavar="DIR", help="compare every file of a finished folder with its checksum"
    )

    add_text_flags(flags.add_argument_group("the text"))
    add_choice_flags(flags.add_argument_group("what is kept"))
    add_token_flags(flags.add_argument_group("the tokens"))
    add_work_flags(flags.add_argument_group("the work (decides nothing about the output)"))
    return flags


def add_text_flags(group) -> None:
    """Adds the flags that say what the documents are."""
    group.add_argument(
        "--field", default="text", help="the text's field or column where a file has several"
    )
    group.add_argument(
        "--task",
        default="plain",
        help="what is learned of a row. plain: the field; supervised: `response` after `prompt`; "
        "spans: those of `spans` without learn=false; chat: what the assistant says; classify: the "
        "words of a label; translate: the text in the other language; see docs/tasks.md",
    )
    group.add_argument(
        "--task_options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of the task, such as label=COLUMN; \\n stands for an end of line",
    )
    group.add_argument(
        "--errors", default="strict", help="undecodable bytes: strict or replace (by U+FFFD)"
    )
    group.add_argument(
        "--encodings",
        nargs="+",
        action=ReplaceDefault,
        default=["utf-8"],
        help="tried in turn on each document",
    )
    group.add_argument(
        "--on_error", default="stop", help="a row that cannot be read: stop, or skip (counted)"
    )
    group.add_argument(
        "--documents", default="file", help="what a document of a text file is: file or line"
    )
    group.add_argument(
        "--separator",
        default="",
        metavar="TEXT",
        help="the text between the documents of a text file, such as <|endoftext|>; it is taken "
        "out, with the end of line after it",
    )


def add_choice_flags(group) -> None:
    """Adds the flags that say which documents are kept, and which are held out."""
    group.add_argument(
        "--filters",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILTER",
        help="in this order, such as strip min_chars:100 normalize:NFC language:en module:function",
    )
    group.add_argument(
        "--dedup",
        default="none",
        metavar="none|exact|near[:SIMILARITY]",
        help="leave out copies of earlier documents; near: by MinHash, with a similarity of 0.8 "
        "if none is given",
    )
    group.add_argument(
        "--eval_fraction",
        type=float,
        default=0.0,
        help="part of the documents held out, by their hash",
    )


def add_token_flags(group) -> None:
    """Adds the flags that say what the shards are."""
    group.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, char, bpe:VOCAB, a path: as config.data.tokenizer; or the workdir of a run, "
        "whose tokenizer is taken",
    )
    group.add_argument(
        "--begin",
        action="store_true",
        help="begin each document with the token that the tokenizer's model expects before a text, "
        "such as <s>; config.data.begin of a run must agree",
    )
    group.add_argument(
        "--tokenizer_mb", type=float, default=200.0, help="MB of text that trains a tokenizer"
    )
    group.add_argument(
        "--piece_mb",
        type=float,
        default=0.0,
        help="MB of input in one unit; 0 means a 500th of the input, but 4 to 64 MB",
    )


def add_work_flags(group) -> None:
    """Adds the flags that say who does the work."""
    group.add_argument(
        "--engine", default="local", help="local: processes of this machine; ray: a Ray cluster"
    )
    group.add_argument(
        "--workers", type=int, default=0, help="processes; 1: this one alone, 0: one a core"
    )
    group.add_argument(
        "--ray_address",
        default="local",
        help="of a cluster (auto, HOST:PORT) that sees input and output under the same paths; "
        "local: one with --workers CPUs is started here",
    )


def run(args: argparse.Namespace) -> None:
    """Prepares the text, then prints a summary. Raises what `main` does."""
    from gpt_jax.data import Engine, prepare_corpus, summarize_corpus

    check_flags(args)
    settings = make_settings(args)
    engine = Engine(args.engine, args.workers or count_cores(), args.ray_address)
    folder = Path(args.output).expanduser()
    inputs = sort_inputs(args.input)
    refuse_nested(args.output, inputs)

    display = Display()
    for name, paths in inputs.items():
        paths = list(dict.fromkeys(paths))
        if len(paths) > 1 and any(text.startswith(f"{name}=") for text in args.input):
            display.say(f"source {name} is given {len(paths)} times and joins {', '.join(paths)}")

    interrupt_once()
    try:
        with taking_run_tokenizer(settings) as taken:
            prepare_corpus(inputs, folder, taken, engine, display.say, display.show)
        display.close()
        emit("\n".join(map(escape, summarize_corpus(folder))))
    except KeyboardInterrupt:
        raise Stopped(
            f"--output={args.output}: interrupted; what is finished stays: "
            "the same command goes on from there"
        ) from None
    finally:
        display.close()


@contextlib.contextmanager
def taking_run_tokenizer(settings) -> Iterator[Any]:
    """The settings, in which a workdir named as the tokenizer is a copy of its tokenizer.

    The copy lies there as long as the context. Raises UsageError for a workdir without checkpoints.
    """
    from gpt_jax.data import parse_tokenizer_spec

    base = parse_tokenizer_spec(settings.tokenizer, "--tokenizer").base
    workdir = Path(base).expanduser()
    if not base or not (workdir / "checkpoints").is_dir():
        yield settings
        return

    from gpt_jax.run import copy_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(workdir, Path(folder))
        try:
            yield replace(settings, tokenizer=f"{folder}{settings.tokenizer.removeprefix(base)}")
        except UsageError as error:
            # Users know the workdir, and not the copy.
            raise type(error)(*(text.replace(folder, base) for text in error.args)) from None


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for a flag that is missing, unknown or out of range."""
    from gpt_jax.data import ENGINES

    if not args.input or not args.output:
        raise UsageError("--input and --output: both are needed (or --inspect or --verify alone)")
    if "://" in args.output:
        raise UsageError(
            f"--output={args.output}: prepare writes to a file system; name a local folder and "
            "copy it there when it is finished (--input may be remote)"
        )
    if args.engine not in ENGINES:
        raise UsageError(f"--engine={args.engine}: expected one of {', '.join(ENGINES)}")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            raise UsageError(f"--{name}={getattr(args, name)}: expected {low} to {high}")


def make_settings(args: argparse.Namespace):
    """The `PrepareSettings` that the flags say. Raises UsageError."""
    from gpt_jax.data import PrepareSettings, Reading

    options = parse_task_options(args.task_options)
    try:
        reading = Reading(
            args.field,
            args.errors,
            tuple(args.encodings),
            args.on_error,
            args.documents,
            args.task,
            args.separator,
            options,
        )
    except UsageError as error:
        # The message names a field, such as `errors = …`, and the user knows the flag.
        raise UsageError(f"--{str(error).replace(' = ', '=', 1)}") from None

    names = [spec.name for spec in fields(PrepareSettings) if spec.name != "reading"]
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values["filters"] = tuple(args.filters)
    return PrepareSettings(**values, reading=reading)


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sort_inputs(texts: list[str]) -> dict[str, tuple[str, ...]]:
    """{source: its paths} of `NAME=PATH` texts, in their order.

    A path that exists under the whole text has no NAME. Raises UsageError for a name that cannot
    be used, and for a text that can be read both ways.
    """
    sources: dict[str, list[str]] = {}
    for text in texts:
        there = is_there(text)
        match = NAMED_PATH.fullmatch(text)
        if there and match and is_there(match[2]):
            raise UsageError(
                f"--input={text}: both {text} and {match[2]} are there; write ./{text} for the "
                f"first, or {match[1]}=./{match[2]} for the second with the name {match[1]}"
            )
        if there:
            match = None
        name, path = match.groups() if match else (SOURCE, text)
        if name.startswith(".") or name in ("work", "all") or name.endswith(".json"):
            raise UsageError(
                f"--input={text}: {name!r} cannot be the name of a source "
                "(the output has files of such names, and all is the sum of sources)"
            )

        wrong = None if match or there else MISNAMED_PATH.match(text)
        if wrong:
            raise UsageError(
                f"--input={text}: {wrong[1]!r} cannot be the name of a source; "
                "use letters, digits and . _ -"
            )
        sources.setdefault(name, []).append(path)
    return {name: tuple(paths) for name, paths in sources.items()}


def refuse_nested(output: str, inputs: dict[str, tuple[str, ...]]) -> None:
    """Raises UsageError if the output folder lies inside a folder of the input."""
    parents = Path(output).expanduser().resolve().parents
    for text in [text for paths in inputs.values() for text in paths]:
        path = Path(text).expanduser()
        if path.is_dir() and path.resolve() in parents:
            raise UsageError(
                f"--output={output}: lies inside --input={path}, which would then read its own "
                "output; name a folder elsewhere"
            )


def look_inside(folder: Path) -> None:
    """Prints what is in a finished folder, for --inspect."""
    from gpt_jax.data import inspect_corpus

    for line in inspect_corpus(folder):
        emit(escape(line))


def verify(folder: Path) -> None:
    """Compares files and checksums, for --verify. Raises DataError, which names damaged files."""
    from gpt_jax.data import verify_corpus

    damaged = verify_corpus(folder, lambda line: print(escape(line), file=sys.stderr))
    if damaged:
        raise DataError(
            f"--verify={folder}: {len(damaged)} damaged: {', '.join(damaged)}; "
            "copy them again, or remove the folder and prepare it again"
        )
    emit(escape(f"{folder}: all files are whole"))
