"""`gpt-jax evaluate` of several checkpoints of a run: --all_steps, and --watch as they appear."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpt_jax.commands.evaluate_results import RESULT_FLAGS
from gpt_jax.commands.evaluate_tasks import find_given, without_nan
from gpt_jax.commands.evaluate_text import TextMeter
from gpt_jax.commands.evaluate_watch import POLL_SECONDS, AllSteps, Next, Watch
from gpt_jax.commands.flags import check_number
from gpt_jax.commands.output import emit, write_json
from gpt_jax.errors import NoCheckpoint, SaveFailed, UsageError, escape
from gpt_jax.files import describe_error, sync_file
from gpt_jax.schema import Misfit, read_json

Row = dict[str, Any]  # what was measured of a step, as JSON
Say = Callable[[str], None]

# The columns of the table: a metric, how it is written, and in how many places.
COLUMNS = (
    ("loss", "{:.4f}", 9),
    ("perplexity", "{:.3f}", 12),
    ("bits_per_byte", "{:.4f}", 13),
    ("accuracy", "{:.4f}", 8),
    ("tokens", "{:,.0f}", 13),
)
# Flags that say what is measured, with the value of each when it is not given.
ASKED = {"text": [], "evaluators": [], "questions": [], "batches": 0, "stride": None}
# Flags that ask one checkpoint alone.
ONE_CHECKPOINT = {"core": "", "lm_eval": "", "limit": None} | RESULT_FLAGS
OUT_SCHEMA = {"checkpoint": "text", "step": "count", "asked": "object"}
ROW_START = b'{"checkpoint":'  # as every row begins
# The longest wait for a next checkpoint: a year.
MOST_MINUTES = 525_600


def add_step_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("several checkpoints of a run")
    group.add_argument(
        "--all_steps", action="store_true", help="evaluate every checkpoint, in order of steps"
    )
    group.add_argument(
        "--watch",
        action="store_true",
        help="evaluate those that are there, and each that appears, until the run ends",
    )
    group.add_argument(
        "--watch_minutes",
        type=float,
        default=0.0,
        metavar="M",
        help="the longest wait for a next checkpoint; 0: as long as the run goes on",
    )
    group.add_argument(
        "--steps_out",
        metavar="FILE.jsonl",
        help="where a line is added for each step; steps that have one are not evaluated again",
    )


def asks_steps(args: argparse.Namespace) -> bool:
    return bool(args.all_steps or args.watch)


def check_step_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together, and for numbers out of range."""
    check_number("--watch_minutes", args.watch_minutes, 0, MOST_MINUTES)
    if args.watch_minutes and not args.watch:
        raise UsageError(f"--watch_minutes={args.watch_minutes:g}: belongs to --watch")
    if args.steps_out and not asks_steps(args):
        raise UsageError(f"--steps_out={args.steps_out}: belongs to --all_steps and --watch")
    if not asks_steps(args):
        return

    asked = "--watch" if args.watch else "--all_steps"
    if args.all_steps and args.watch:
        raise UsageError("--all_steps: --watch evaluates what is there too; leave one out")
    if args.step:
        raise UsageError(f"--step={args.step}: is one checkpoint; leave it out with {asked}")
    others = find_given(args, ONE_CHECKPOINT)
    if others:
        raise UsageError(f"{others[0]}: is for one checkpoint; leave it out with {asked}")
    if "://" in args.checkpoint:
        raise UsageError(
            f"--checkpoint={args.checkpoint}: is a URL; {asked} needs a folder on this machine"
        )
    if args.watch and is_one_step(args.checkpoint):
        raise UsageError(f"--checkpoint={args.checkpoint}: is one step; name the workdir to watch")
    if args.steps_out and not Path(args.steps_out).absolute().parent.is_dir():
        raise UsageError(f"--steps_out={args.steps_out!r}: its folder does not exist")


def is_one_step(path: str) -> bool:
    """Whether a path is a step's folder, and no workdir with a number for a name."""
    from gpt_jax.train import CHECKPOINT_FOLDER

    place = Path(path).absolute()
    return place.name.isdecimal() and place.parent.name == CHECKPOINT_FOLDER


def measure_steps(args: argparse.Namespace, say: Say) -> None:
    """Evaluates the checkpoints and prints a row for each. Process 0 alone prints and writes.

    Raises UsageError as evaluating one checkpoint does, SaveFailed if --steps_out cannot be
    written, and NoCheckpoint if nothing could be evaluated.
    """
    import jax

    from gpt_jax.hardware import check_miscompiles
    from gpt_jax.interop import is_foreign

    if is_foreign(args.checkpoint):
        raise UsageError(f"--checkpoint={args.checkpoint}: has no steps; it is one model")
    for line in check_miscompiles(jax.local_devices()[0], args.ignore_miscompiles):
        say(line)
    rows = []
    for row in walk(args, say):
        if jax.process_index() != 0:
            continue
        rows.append({name: value for name, value in row.items() if name != "asked"})
        if not args.json:
            show_row(row, is_first=len(rows) == 1)
        elif args.watch:
            emit(write_json(rows[-1]))
    if args.json and args.all_steps and jax.process_index() == 0:
        emit(write_json({"steps": rows}, 2))


def walk(args: argparse.Namespace, say: Say) -> Iterator[Row]:
    """A row for each checkpoint, in order, from --steps_out where it is there already.

    Raises what `measure_steps` does.
    """
    import jax

    from gpt_jax.cluster import agree_on
    from gpt_jax.run import load_step

    out = OutFile(args, say)
    # The first checkpoint may be hours away, and what is wrong with the file is known now.
    agree_on(out.open)
    meter = make_meter(args, say)
    count = 0
    damage = ""
    for directory, step, is_known in find_steps(args, out, say):
        if is_known:
            say(f"step {step}: is in {args.steps_out} already")
            # Process 0 alone reads the file, and shows what is in it.
            row = out.find(directory, step) if jax.process_index() == 0 else None
            row = row or {}
        else:
            try:
                loaded = load_step(Path(directory), step, say, args.base)
            except NoCheckpoint as error:
                damage = str(error)
                say(f"{damage}; it is passed over")
                continue
            if loaded is None:
                say(f"step {step} of {directory} was deleted by its run before it could be read")
                continue
            row = meter(loaded)
            # The weights of the next step are read without these beside them.
            del loaded
            agree_on(partial(out.add, row))
        count += 1
        yield row
    if not count:
        raise NoCheckpoint(damage or f"{args.checkpoint}: no checkpoint was evaluated")


def find_steps(
    args: argparse.Namespace, out: "OutFile", say: Say
) -> Iterator[tuple[str, int, bool]]:
    """(checkpoints' folder, step, whether --steps_out has it) of each checkpoint, as it is there.

    Process 0 decides for all.
    """
    from gpt_jax.cluster import agree_on

    finder = AllSteps(args.checkpoint, say)
    if args.watch:
        finder = Watch(args.checkpoint, args.watch_minutes, say)

    def decide() -> list:
        found = finder.find()
        return [*found, out.find(found.directory, found.step) is not None]

    while True:
        *found, is_known = agree_on(decide)
        what, directory, step = Next(*found)
        if what == "end":
            return
        if what == "wait":
            time.sleep(POLL_SECONDS)
            continue
        yield directory, step, is_known


def make_meter(args: argparse.Namespace, say: Say) -> Callable[[Any], Row]:
    """What measures a loaded checkpoint: text, or --questions."""
    if not args.questions:
        text_meter = TextMeter(args, say)
        return lambda loaded: text_meter.measure(loaded).to_json()

    import jax

    from gpt_jax.evals import Subject, check_questions, measure_questions

    def ask(loaded) -> Row:
        config = loaded.config
        subject = Subject(config.model, config.compute, loaded.params, loaded.tokenizer)
        # All files are looked at before the first is asked, and each tells then what it leaves out.
        check_questions(config.model, loaded.tokenizer, args.questions, lambda line: None)
        with jax.set_mesh(loaded.mesh):
            metrics = measure_questions(subject, args.questions, say)
        row = {"checkpoint": str(loaded.directory), "step": loaded.step}
        return row | {"questions": without_nan(metrics)}

    return ask


# ---- the file of --steps_out ----


class OutFile:
    """A file of JSON lines with a row for each step, or nothing without --steps_out.

    Process 0 alone reads and writes it.
    """

    def __init__(self, args: argparse.Namespace, say: Say):
        self._say = say
        self._path = Path(args.steps_out) if args.steps_out else None
        # What tells whether two rows of one step would be the same.
        self._asked = {
            name: getattr(args, name)
            for name, default in ASKED.items()
            if getattr(args, name) != default
        }
        # The rows of a batch decide which text is measured only if batches are counted.
        if args.batches and args.batch_size:
            self._asked["batch_size"] = args.batch_size
        self._rows: dict[tuple[str, int], Row] = {}

    def open(self) -> None:
        """Reads the rows that the file has. Raises UsageError if it cannot be used."""
        if self._path is not None:
            self._rows = self._read(self._path)

    def find(self, directory: str, step: int) -> Row | None:
        """The row of a checkpoint, if the file has it.

        Raises UsageError if the file has rows of this run for other flags.
        """
        if self._path is None or not directory:
            return None
        row = self._rows.get((directory, step))
        if row is not None and row["asked"] != self._asked:
            flags = " ".join(f"--{name}={value}" for name, value in row["asked"].items())
            raise UsageError(
                f"--steps_out={self._path}: has step {step} of {directory} for other flags "
                f"({flags or 'none'}); name another file"
            )
        return row

    def _read(self, path: Path) -> dict[tuple[str, int], Row]:
        """The rows by folder and step. A line that was cut by a kill is taken out.

        Raises UsageError if the file cannot be read and written, or is another one.
        """
        try:
            with open(path, "a+b") as file:
                file.seek(0)
                *whole, torn = file.read().split(b"\n")
                # Nothing is taken out of a file of somebody else.
                rows = read_rows(path, whole, torn)
                if torn:
                    self._say(f"{path}: its last line was cut, so it is taken out")
                    file.truncate(file.tell() - len(torn))
        except OSError as error:
            raise UsageError(f"--steps_out={path}: {describe_error(error)}") from None
        return rows

    def add(self, row: Row) -> None:
        """Adds a row, on disk when it returns. Raises SaveFailed."""
        if self._path is None:
            return
        line = write_json({**row, "asked": self._asked}) + "\n"
        try:
            with open(self._path, "ab") as file:
                file.write(line.encode())
                sync_file(file)
        except OSError as error:
            raise SaveFailed(
                f"--steps_out={self._path}: cannot be written: {describe_error(error)}; steps "
                "before are in it, and the same command goes on after them"
            ) from None


def read_rows(path: Path, whole: list[bytes], torn: bytes) -> dict[tuple[str, int], Row]:
    """The rows of `whole` lines by folder and step.

    Raises UsageError if one of them, or the last line without an end, is of no such file.
    """
    rows = {}
    for number, line in enumerate(whole, 1):
        try:
            row = read_json(line, OUT_SCHEMA)
        except Misfit as error:
            raise UsageError(
                f"--steps_out={path}, line {number}: no row of this command ({error}); name "
                "another file"
            ) from None
        rows[row["checkpoint"], row["step"]] = row
    if torn[: len(ROW_START)] != ROW_START[: len(torn)]:
        raise UsageError(
            f"--steps_out={path}, line {len(whole) + 1}: no row of this command; name another file"
        )
    return rows


# ---- what is printed ----


def show_row(row: Row, is_first: bool) -> None:
    """Prints the lines of a step, under a header if it is the first one."""
    texts = {**row.get("sources", {}), **row.get("sets", {})}
    lines = []
    if texts:
        width = max(map(len, ("source", *texts)))
        if is_first:
            names = [name.rjust(size) for name, _, size in COLUMNS]
            lines.append("  ".join(["step".rjust(9), "source".ljust(width), *names]))
        for text, metrics in texts.items():
            cells = [format_cell(metrics[name], form).rjust(size) for name, form, size in COLUMNS]
            lines.append("  ".join([f"{row['step']:9}", text.ljust(width), *cells]))
    for name, value in {**row.get("questions", {}), **row.get("evaluators", {})}.items():
        shown = value if isinstance(value, str) else format_cell(value, "{:.4f}")
        lines.append(f"step {row['step']}  {name}: {shown}")
    emit("\n".join(map(escape, lines)))


def format_cell(value: float | None, form: str) -> str:
    """A number for people. One that is not finite is a dash."""
    return "-" if value is None else form.format(value)
