"""Where metrics go: metrics.jsonl, TensorBoard, and a line or a bar for a person."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from gpt_jax.errors import SaveFailed, complain
from gpt_jax.files import describe_error, free_name, replace_file
from gpt_jax.schema import Misfit, read_json, require


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns a failure of the disk (full, read-only …) into SaveFailed, which names `path`."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{path}: cannot be written: {describe_error(error)}; saved checkpoints are intact"
        ) from error


def save_file(path: Path, data: bytes) -> None:
    """Writes `path` whole, or leaves it alone. Raises SaveFailed."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


# What a line of metrics.jsonl holds: its fields by name, and its values by how their names begin.
LINE_SCHEMA = {
    "step": "count",
    "session/number?": "finite number",
    "session/learning_rate?": "finite number",
}
PREFIXES = {
    "train/": "number or null",
    "eval/": "number or null",
    "throughput/": "number or null",
    "moe/": "number or null",
    "time/": "finite number",
    "sample/": "text",
    "session/": "text or number",
}


def _parse_line(line: bytes) -> dict:
    """The row of a line. Raises Misfit."""
    row = read_json(line, LINE_SCHEMA)
    for key in row:
        for prefix, schema in PREFIXES.items():
            if key.startswith(prefix):
                require({key: row[key]}, {key: schema})
    return row


def _read_lines(path: Path, report: Callable[[str], None]) -> list[tuple[dict, bytes]]:
    """(row, its line) of every whole and sound line, see `read_jsonl`."""
    if not path.exists():
        return []
    try:
        *whole, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        report(f"{path}: cannot be read ({describe_error(error)}), so earlier metrics are left out")
        return []

    pairs = []
    problems = []
    for number, line in enumerate(whole, 1):
        try:
            pairs.append((_parse_line(line), line + b"\n"))
        except Misfit as error:
            problems.append(f"line {number} ({error})")
    if problems:
        more = f" and {len(problems) - 1} more" if problems[1:] else ""
        report(f"{path}: damaged, so {problems[0]}{more} is left out")
    return pairs


def read_jsonl(path: str | Path, report: Callable[[str], None] = complain) -> list[dict]:
    """The rows of metrics.jsonl; [] without a file.

    A last line without its newline was cut by a kill, and is left out. A line that no run has
    written, or a file that cannot be read, is left out too, and `report` gets a line about it. So a
    log never keeps a run from going on.
    """
    return [row for row, _ in _read_lines(Path(path), report)]


def _clear_place(path: Path, report: Callable[[str], None]) -> None:
    """Moves a folder aside that lies where a file belongs. Raises SaveFailed."""
    if path.is_dir():
        with saving(path):
            aside = path.rename(free_name(path))
        report(f"{path}: is a folder, where a file belongs; it is now {aside}")


def to_json_line(step: int, values: Mapping[str, float | str]) -> bytes:
    """One line of strict JSON.

    nan and infinities become null, and "nonfinite" says which each was.
    """
    row: dict = {"step": int(step)}
    nonfinite = {}
    for key, value in values.items():
        number = value if isinstance(value, str) else float(value)
        if isinstance(number, float) and not math.isfinite(number):
            nonfinite[key] = str(number)
            number = None
        row[key] = number
    if nonfinite:
        row["nonfinite"] = nonfinite

    # "replace": a lone surrogate, which UTF-8 has no bytes for, becomes a question mark.
    return json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


# Writers share one interface: write(step, {key: number}), text(step, key, str), close().
class JsonlWriter:
    """metrics.jsonl: one JSON object a line.

    `resumed_at` drops the lines of later steps, so that the curve has no overlap. None means that
    nothing was restored, and starts an empty file. `report` gets a line about what is damaged
    there, see `read_jsonl`. Raises SaveFailed when the disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        resumed_at: int | None = None,
        report: Callable[[str], None] = complain,
    ):
        self.path = Path(path)
        _clear_place(self.path, report)
        lines = []
        if resumed_at is not None:
            pairs = _read_lines(self.path, report)
            lines = [line for row, line in pairs if row["step"] <= resumed_at]
        save_file(self.path, b"".join(lines))
        self._file = open(self.path, "ab")  # noqa: SIM115 (`close` closes it)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        with saving(self.path):
            self._file.write(to_json_line(step, values))
            self._file.flush()  # a reader, or a kill, finds every line written so far

    def text(self, step: int, key: str, text: str) -> None:
        self.write(step, {key: text})

    def close(self) -> None:
        with saving(self.path):
            self._file.close()


class TensorBoardWriter:
    """TensorBoard event files in `directory`. Raises SaveFailed when the disk is full.

    On resume TensorBoard is told to drop what came after `resumed_at`. The events are written by
    the caller's thread. The library's ready-made writer hands them to a thread of its own, which
    dies when the disk is full. Its queue then blocks the run for ever.
    """

    def __init__(
        self, directory: str | Path, resumed_at: int | None = None, every_seconds: float = 30.0
    ):
        # Imported here because only runs that log to TensorBoard should pay for it.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.path = Path(directory)
        self._summary = summary
        # protobuf makes these classes when it is imported, so no checker sees them.
        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        start = event_pb2.SessionLog.START  # pyright: ignore[reportAttributeAccessIssue]
        log = event_pb2.SessionLog(status=start)  # pyright: ignore[reportAttributeAccessIssue]
        self._every = every_seconds

        first = 0 if resumed_at is None else resumed_at + 1
        with saving(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self.path / "events"))
            self._writer.write_event(self._event(step=first, session_log=log))
            self._flush()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def _add(self, step: int, *summaries) -> None:
        with saving(self.path):
            for summary in summaries:
                event = self._event(wall_time=time.time(), step=step, summary=summary)
                self._writer.write_event(event)
            # A flush waits for the disk, so it comes now and then only.
            if time.monotonic() - self._flushed > self._every:
                self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, *(self._summary.scalar(key, float(value)) for key, value in values.items()))

    def text(self, step: int, key: str, text: str) -> None:
        text = text.encode("utf-8", "replace").decode().replace("\n", "\n    ")
        # TensorBoard reads markdown, where an indented block is verbatim.
        self._add(step, self._summary.text(key, "    " + text))

    def close(self) -> None:
        with saving(self.path):
            self._writer.close()


def human(number: float) -> str:
    """12345 -> "12.3k"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3723.4 -> "1:02:03"; 61 -> "1:01"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# What people see while a run goes on: (key, how it is shown).
SHOWN = (
    ("train/loss", "loss {:.4f}"),
    ("eval/loss", "held-out loss {:.4f}"),
    ("eval/bits_per_byte", "{:.4f} bits/byte"),
    ("throughput/tokens_per_second", "{} tok/s"),
)


def format_shown(values: Mapping[str, float], sets: Sequence[str] = ()) -> str:
    """The values of SHOWN that are there, in its order, and then those of each held-out set."""
    parts = []
    for key, how in SHOWN:
        if key in values:
            is_rate = key.endswith("per_second")
            parts.append(how.format(human(values[key]) if is_rate else float(values[key])))
    for name in sets:
        loss = values.get(f"eval/{name}/loss")
        if loss is not None:
            rate = values[f"eval/{name}/bits_per_byte"]
            parts.append(f"{name} {float(loss):.4f} ({float(rate):.4f} bits/byte)")
    return "  ".join(parts)


class BarWriter:
    """Progress for a person: a bar on a terminal, else a plain line every `every_seconds`.

    With `progress` off a terminal gets plain lines too. Evaluations and texts are printed in full,
    above the bar. The plain line's ETA counts from the first write, so that compilation is not
    extrapolated. `work(step)` is what the first steps are of the whole, where steps are not equal.
    The plain line goes by it. The remaining time of the bar is tqdm's, which takes all steps as
    equal. `sets` are the names of held-out sets, whose losses an evaluation prints too.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        progress: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        now: Callable[[], float] = time.monotonic,
        work: Callable[[int], int] = int,
        sets: Sequence[str] = (),
    ):
        self._total = total
        self._work = work
        self._sets = sets
        self._stream = stream or sys.stderr
        self._every = every_seconds
        self._now = now
        self._first: tuple[int, float] | None = None  # (step, moment) of the first plain line
        self._printed: float | None = None  # the moment of the last one
        self._bar = self._make_bar(total, start) if progress and self._stream.isatty() else None

    def _make_bar(self, total: int, start: int):
        from tqdm import tqdm

        # On a terminal that says it has no lines tqdm would show nothing at all.
        is_sized = shutil.get_terminal_size((0, 0)).lines > 0
        return tqdm(
            total=total,
            initial=start,
            file=self._stream,
            ncols=80,
            nrows=20,
            dynamic_ncols=is_sized,
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total}  {desc}  {elapsed} < {remaining}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = format_shown(values, self._sets)
        if any(key.startswith("eval/") for key in values):
            self._print(f"step {step}  {shown}")
        elif self._bar is not None:
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_line_due(step):
            self._print_progress(step, shown)

    def _is_line_due(self, step: int) -> bool:
        if self._printed is None or step >= self._total:
            return True
        return self._now() - self._printed >= self._every

    def _print_progress(self, step: int, shown: str) -> None:
        moment = self._now()
        self._printed = moment
        self._first = self._first or (step, moment)
        done = self._work(step) - self._work(self._first[0])
        left = self._work(self._total) - self._work(step)

        eta = ""
        if done > 0 and left > 0:
            seconds = (moment - self._first[1]) / done * left
            eta = f"  ETA {duration(seconds)}"
        self._print(f"step {step}/{self._total}  {shown}{eta}")

    def _print(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"  # a narrow terminal must not stop the run
        show = print if self._bar is None else self._bar.write
        try:
            show(text.encode(encoding, "replace").decode(encoding), file=self._stream)
            self._stream.flush()
        except OSError:  # nor must a reader that has gone, or a full disk
            self._stream = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
            self._bar = None

    def text(self, step: int, key: str, text: str) -> None:
        self._print(f"step {step}  {key}\n    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Writers:
    """Several writers as one. Processes that only compute have none.

    `close` closes all of them, even if one fails.
    """

    def __init__(self, writers: Sequence = ()):
        self._writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def text(self, step: int, key: str, text: str) -> None:
        for writer in self._writers:
            writer.text(step, key, text)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
