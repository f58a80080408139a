"""Where metrics end: metrics.jsonl, TensorBoard, a line or a bar for a person (floor 0; called
by loop and report)."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.files import replace_file


@contextlib.contextmanager
def saving(path: Path):
    """Turns a failure of the disk (full, read-only …) into SaveFailed, one line that names
    `path`."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{path}: cannot be written: {error.strerror}; saved checkpoints are intact"
        ) from error


def save_file(path: Path, data: bytes) -> None:
    """Writes `path` whole, or leaves it alone. Raises SaveFailed."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def _read_lines(path: Path) -> list[tuple[dict, bytes]]:
    *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    pairs = []
    try:
        for line in whole:
            row = json.loads(line)
            pairs.append((row | {"step": int(row["step"])}, line + b"\n"))
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"{path} line {len(pairs) + 1}: not a JSON object with a step; "
            "remove the line or move the file away"
        ) from None
    return pairs


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of metrics.jsonl; [] without a file. A last line cut by a kill (no newline) is left
    out; any other line that is no JSON object with a `step` raises UsageError naming it."""
    return [row for row, _ in _read_lines(Path(path))]


def to_json_line(step: int, values: Mapping[str, float | str]) -> bytes:
    """One line of strict JSON. nan and infinities become null, and "nonfinite" says which each
    was."""
    row = {key: value if isinstance(value, str) else float(value) for key, value in values.items()}
    nonfinite = {
        key: str(v) for key, v in row.items() if isinstance(v, float) and not math.isfinite(v)
    }
    row = {
        "step": int(step),
        **row,
        **dict.fromkeys(nonfinite),
        **({"nonfinite": nonfinite} if nonfinite else {}),
    }
    # "replace": a lone surrogate, which UTF-8 has no bytes for, becomes a question mark.
    return json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


# Writers share one interface: write(step, {key: number}), text(step, key, str), close().
class JsonlWriter:
    """metrics.jsonl: one JSON object a line. `resumed_at` drops the lines of later steps, so
    that the curve has no overlap; None (nothing was restored) starts an empty file. Raises
    SaveFailed when the disk is full."""

    def __init__(self, path: str | Path, resumed_at: int | None = None):
        self.path = Path(path)
        lines = [] if resumed_at is None else _read_lines(self.path)
        save_file(self.path, b"".join(line for row, line in lines if row["step"] <= resumed_at))
        self._file = open(self.path, "ab")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with saving(self.path):
            self._file.write(to_json_line(step, values))
            self._file.flush()  # a reader, or a kill, finds every line written so far

    def text(self, step: int, key: str, text: str) -> None:
        self.write(step, {key: text})

    def close(self) -> None:
        with saving(self.path):
            self._file.close()


class TensorBoardWriter:
    """TensorBoard event files in `directory`. On resume TensorBoard is told to drop what came after
    `resumed_at`.

    Written here and now: the library's ready-made writer hands events to a thread, and when the
    disk is full that thread dies and its queue then blocks the run for ever. Raises SaveFailed
    instead."""

    def __init__(
        self, directory: str | Path, resumed_at: int | None = None, every_seconds: float = 30.0
    ):
        # Here, because only runs that log to TensorBoard should pay for it.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path, self._summary, self._event, self._every = (
            Path(directory),
            summary,
            Event,
            every_seconds,
        )
        first = 0 if resumed_at is None else resumed_at + 1
        with saving(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self.path / "events"))
            self._writer.write_event(
                Event(step=first, session_log=SessionLog(status=SessionLog.START))
            )
            self._flush()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def _add(self, step: int, *summaries) -> None:
        with saving(self.path):
            for summary in summaries:
                self._writer.write_event(
                    self._event(wall_time=time.time(), step=step, summary=summary)
                )
            if time.monotonic() - self._flushed > self._every:  # it waits for the disk
                self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, *(self._summary.scalar(key, float(value)) for key, value in values.items()))

    def text(self, step: int, key: str, text: str) -> None:
        text = text.encode("utf-8", "replace").decode().replace("\n", "\n    ")
        self._add(
            step, self._summary.text(key, "    " + text)
        )  # markdown: an indented block is verbatim

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
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


SHOWN = (  # what people see while it runs: (key, how)
    ("train/loss", "loss {:.4f}"),
    ("eval/loss", "held-out loss {:.4f}"),
    ("eval/bits_per_byte", "{:.4f} bits/byte"),
    ("throughput/tokens_per_second", "{} tok/s"),
)


class BarWriter:
    """Progress for a person: a bar on a terminal, else (or with `progress` off) a plain line every
    `every_seconds`.

    Evaluations and texts are printed in full, above the bar. The plain line's ETA counts from
    the first write, so that compilation is not extrapolated."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        progress: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._total, self._stream, self._every, self._now = (
            total,
            stream or sys.stderr,
            every_seconds,
            now,
        )
        self._first = self._printed = self._bar = None
        if progress and self._stream.isatty():
            from tqdm import tqdm

            sized = (
                shutil.get_terminal_size((0, 0)).lines > 0
            )  # on a terminal of 0 x 0 tqdm would show nothing at all
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                ncols=80,
                nrows=20,
                dynamic_ncols=sized,
                bar_format="{percentage:3.0f}%|{bar}| {n}/{total}  {desc}  {elapsed} < {remaining}",
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(
            how.format(human(values[key]) if "second" in key else float(values[key]))
            for key, how in SHOWN
            if key in values
        )
        if any(key.startswith("eval/") for key in values):
            self._line(f"step {step}  {shown}")
        elif self._bar is not None:
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif (
            self._printed is None
            or self._now() - self._printed >= self._every
            or step >= self._total
        ):
            self._printed = moment = self._now()
            self._first = self._first or (step, moment)
            done, left, seconds = step - self._first[0], self._total - step, moment - self._first[1]
            eta = f"  ETA {duration(seconds / done * left)}" if done > 0 and left > 0 else ""
            self._line(f"step {step}/{self._total}  {shown}{eta}")

    def _line(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"  # a narrow terminal must not stop the run
        show = print if self._bar is None else self._bar.write
        try:
            show(text.encode(encoding, "replace").decode(encoding), file=self._stream)
            self._stream.flush()
        except OSError:  # nor must a reader that has gone, or a full disk
            self._stream, self._bar = open(os.devnull, "w"), None

    def text(self, step: int, key: str, text: str) -> None:
        self._line(f"step {step}  {key}\n    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Writers:
    """Several writers as one; none on processes that only compute. `close` closes all, even if
    one fails."""

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
