"""`gpt-jax prepare`: raw text to a folder of token shards, and a look into such a folder."""

import argparse
import contextlib
import glob
import os
import re
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.errors import DataError, Stopped, UsageError

SECONDS = 10.0  # between two lines of progress where there is no terminal
BAR_SECONDS = 0.2  # and on one
NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
MISNAMED = re.compile(r"([^/=?*]*)=")  # an attempt at one
SOURCE = "text"  # the source of input without a name


def main(arguments: list[str]) -> None:
    """Raises UsageError for input, settings and folders of no use, DataError for damage,
    PeerFailed for lost workers."""
    args = make_flags().parse_args([part for text in arguments for part in apart(text)])
    looks = [name for name in ("inspect", "verify") if getattr(args, name)]
    if looks and (args.input or args.output or len(looks) > 1):
        raise UsageError(f"--{looks[0]}={getattr(args, looks[0])}: is given alone")
    if args.inspect:
        look_inside(Path(args.inspect).expanduser())
    elif args.verify:
        verify(Path(args.verify).expanduser())
    else:
        run(args)


def apart(text: str) -> list[str]:
    """`--input=a` as `--input a`: argparse takes no further values after the first form, and
    people type them."""
    flag, equals, value = text.partition("=")
    return [flag, value] if equals and flag in ("--input", "--filters", "--encodings") else [text]


class Given(argparse.Action):
    """Values that take the place of the default, and of a flag given again are added."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        earlier = [] if before is self.default else list(before)
        setattr(namespace, self.dest, [*earlier, *(values or [])])


def make_flags() -> Flags:
    """The command line."""
    flags = Flags(
        prog="gpt-jax prepare",
        description="Read text, filter it, and write token shards that "
        "--config.data.path takes. Killed at any moment, the same command goes on where it was; "
        "when all is "
        "finished it says so, after a look at the files' sizes: their content is checked by "
        "--verify. "
        "Memory: for each worker some 200 MB, a few times the largest document, and 32 bytes a "
        "document of a "
        "unit.",
    )
    flags.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help="files, directories, globs, URLs, hf://name[:config][@split][#revision]; NAME: the "
        "source "
        "they are",
    )
    flags.add_argument(
        "--output", metavar="DIR", help="a new folder, or one that an earlier call began"
    )
    flags.add_argument("--inspect", metavar="DIR", help="print what is inside a finished folder")
    flags.add_argument(
        "--verify", metavar="DIR", help="compare every file of a finished folder with its checksum"
    )
    text = flags.add_argument_group("the text")
    text.add_argument(
        "--field", default="text", help="the text's field or column where a file has several"
    )
    text.add_argument(
        "--errors", default="strict", help="undecodable bytes: strict or replace (by U+FFFD)"
    )
    text.add_argument(
        "--encodings",
        nargs="+",
        action=Given,
        default=["utf-8"],
        help="tried in turn on each document",
    )
    text.add_argument(
        "--on_error", default="stop", help="a row that cannot be read: stop, or skip (counted)"
    )
    text.add_argument(
        "--documents", default="file", help="what a document of a text file is: file or line"
    )
    text.add_argument(
        "--filters",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILTER",
        help="in this order, such as strip min_chars:100 normalize:NFC language:en module:function",
    )
    text.add_argument(
        "--dedup",
        default="none",
        metavar="none|exact|near[:SIMILARITY]",
        help="leave out copies of earlier documents; near: by MinHash, 0.8 if no similarity is "
        "given",
    )
    text.add_argument(
        "--eval_fraction",
        type=float,
        default=0.0,
        help="part of the documents held out, by their hash",
    )
    tokens = flags.add_argument_group("the tokens")
    tokens.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, char, bpe:VOCAB, a path: as config.data.tokenizer",
    )
    tokens.add_argument(
        "--tokenizer_mb", type=float, default=200.0, help="of text that a trained tokenizer sees"
    )
    tokens.add_argument(
        "--piece_mb",
        type=float,
        default=0.0,
        help="input of a unit of work and of a shard; 0: a 500th of the input, 4 to 64",
    )
    work = flags.add_argument_group("the work (decides nothing about the output)")
    work.add_argument(
        "--engine", default="local", help="local: processes of this machine; ray: a Ray cluster"
    )
    work.add_argument(
        "--workers", type=int, default=0, help="processes; 1: this one alone, 0: one a core"
    )
    work.add_argument(
        "--ray_address",
        default="local",
        help="of a cluster (auto, HOST:PORT) that sees input and "
        "output under the same paths; local: one of --workers CPUs is started here",
    )
    return flags


def run(args) -> None:
    """Prepares, then prints what came of it."""
    from gpt_jax.data import (
        ENGINES,
        Engine,
        PrepareSettings,
        Reading,
        prepare_corpus,
        summarize_corpus,
    )

    if not args.input or not args.output:
        raise UsageError("--input and --output: both are needed (or --inspect or --verify alone)")
    if "://" in args.output:
        raise UsageError(
            f"--output={args.output}: prepare writes to a file system; name a local folder and "
            "copy it "
            "there when it is finished (--input may be remote)"
        )
    if args.engine not in ENGINES:
        raise UsageError(f"--engine={args.engine}: expected one of {', '.join(ENGINES)}")
    limits = {
        "eval_fraction": (0.0, 0.9),
        "piece_mb": (0.0, 1e6),
        "tokenizer_mb": (1e-6, 1e9),
        "workers": (0, 4096),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UsageError(f"--{name}={getattr(args, name)}: expected {low} to {high}")
    try:
        reading = Reading(
            args.field, args.errors, tuple(args.encodings), args.on_error, args.documents
        )
    except UsageError as error:
        raise UsageError(f"--{str(error).replace(' = ', '=', 1)}") from None
    given = {
        spec.name: getattr(args, spec.name)
        for spec in fields(PrepareSettings)
        if spec.name != "reading"
    }
    settings = PrepareSettings(**given | {"reading": reading, "filters": tuple(args.filters)})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    engine = Engine(args.engine, args.workers or cores or 1, args.ray_address)
    folder, display, inputs = Path(args.output).expanduser(), Display(), named(args.input)
    for path in (Path(path).expanduser() for paths in inputs.values() for path in paths):
        if path.is_dir() and path.resolve() in folder.resolve().parents:
            raise UsageError(
                f"--output={args.output}: lies inside --input={path}, which would then read its "
                "own "
                "output; name a folder elsewhere"
            )
    for name, paths in inputs.items():
        paths = list(dict.fromkeys(paths))
        if paths[1:] and any(text.startswith(f"{name}=") for text in args.input):
            display.say(f"source {name} is given {len(paths)} times and joins {', '.join(paths)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is like Ctrl-C
    try:
        prepare_corpus(inputs, folder, settings, engine, display.say, display.show)
    except KeyboardInterrupt:
        raise Stopped(
            f"--output={args.output}: interrupted; what is finished stays: the same command goes "
            "on from "
            "there"
        ) from None
    finally:
        display.close()
    emit("\n".join(summarize_corpus(folder)))


def named(given: list[str]) -> dict[str, tuple[str, ...]]:
    """{source: its paths} in the order given. A path that exists as it is written is no
    NAME=PATH."""
    found: dict[str, list[str]] = {}
    for text in given:
        match = None if os.path.exists(text) or glob.glob(text) else NAMED.fullmatch(text)
        name, path = match.groups() if match else (SOURCE, text)
        if name.startswith(".") or name in ("work", "all") or name.endswith(".json"):
            raise UsageError(
                f"--input={text}: {name!r} cannot be the name of a source (the output has files of "
                "such "
                "names, and all is the sum of sources)"
            )
        if (
            not match
            and (typed := MISNAMED.match(text))
            and not os.path.exists(text)
            and not glob.glob(text)
        ):
            raise UsageError(
                f"--input={text}: {typed[1]!r} cannot be the name of a source; use letters, digits "
                "and "
                ". _ -"
            )
        found.setdefault(name, []).append(path)
    return {name: tuple(paths) for name, paths in found.items()}


class Display:
    """Progress for people on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self):
        self.bar, self.phase, self.began, self.told = None, "", 0.0, 0.0

    def say(self, line: str) -> None:
        self._end_bar()
        with contextlib.suppress(
            OSError
        ):  # a reader that has gone (`2>&1 | head`), a full disk: the work goes on
            print(f"prepare: {line}", file=sys.stderr, flush=True)

    def show(self, progress) -> None:
        """Called several times a second."""
        now = time.monotonic()
        if progress.phase != self.phase:
            self._end_bar()
            self.phase, self.began, self.told = progress.phase, now, now
        seconds = max(now - self.began, 1e-9)
        documents, megabytes = progress.documents / seconds, progress.bytes / seconds / 1e6
        speed = f"{documents:,.0f} documents/s, {megabytes:,.2f} MB/s of text"
        terminal = sys.stderr.isatty()
        if now - self.told < (BAR_SECONDS if terminal else SECONDS):
            return
        self.told = now
        if terminal:
            self._draw(progress, speed)
        else:
            left = "the first units are under way"
            if progress.done:
                left = f"{seconds * (progress.total - progress.done) / progress.done:,.0f} s left"
            done, total = (f"{size / 1e6:,.0f}" for size in (progress.done, progress.total))
            self.say(f"{progress.phase}: {done} of {total} MB of input, {speed}, {left}")

    def _draw(self, progress, speed: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            layout = (
                "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B "
                "[{elapsed}<{remaining}]{postfix}"
            )
            self.bar = tqdm(
                total=progress.total,
                desc=progress.phase,
                unit_scale=True,
                bar_format=layout,
                leave=False,
            )
        self.bar.set_postfix_str(speed, refresh=False)
        self.bar.n = progress.done
        self.bar.refresh()

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    close = _end_bar


def look_inside(folder: Path) -> None:
    """--inspect."""
    from gpt_jax.data import inspect_corpus

    for line in inspect_corpus(folder):
        emit(line)


def verify(folder: Path) -> None:
    """--verify; DataError naming the damaged files."""
    from gpt_jax.data import verify_corpus

    wrong = verify_corpus(folder, lambda line: print(line, file=sys.stderr))
    if wrong:
        raise DataError(
            f"--verify={folder}: {len(wrong)} damaged: {', '.join(wrong)}; copy them again, or "
            "remove the "
            "folder and prepare it again"
        )
    emit(f"{folder}: all files are whole")
