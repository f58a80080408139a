"""Metrics: mergeable sums, the writers they end in, and where the wall time goes (floor 0).

Called by gpt_jax/loop.py, evals.py and report.py. Names are `room/what`, one meaning each:

    train/loss  train/bits_per_byte  train/accuracy  train/learning_rate  train/grad_norm  train/param_norm
    eval/loss   eval/bits_per_byte   eval/accuracy   eval/perplexity      sample/<n> (text)
    throughput/tokens_per_second  throughput/tokens_seen  throughput/mfu_full  throughput/mfu_causal
    time/<phase of PHASES> (fractions, sum 1)  time/host  time/data_wait  (see Clock)
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence, TextIO

import jax

from gpt_jax.errors import SaveFailed, UsageError

Sums = dict[str, tuple[Any, Any]]  # name -> (sum, weight): floats or float32 scalars on device; a pytree


def add(a: Sums, b: Sums) -> Sums:
    """Sums of the union of what `a` and `b` summed; a name only one of them has passes through. Works under jit."""
    both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
    return {**a, **b, **both}


def divide(sums: Sums) -> dict[str, float]:
    """sum / weight of each name, on the host, once, at print time; weight 0 gives nan."""
    return {name: float(total) / float(weight) if weight else math.nan for name, (total, weight) in sums.items()}


def bits_per_byte(nll_sum: float, bytes_sum: float) -> float:
    """Natural-log loss summed over tokens, as bits a byte of the text they spell: comparable across tokenizers."""
    return float(nll_sum) / math.log(2) / float(bytes_sum) if bytes_sum else math.nan


def perplexity(nll_sum: float, weight: float) -> float:
    """exp of the mean loss; inf where that overflows a float, nan without weight."""
    mean = float(nll_sum) / float(weight) if weight else math.nan
    return math.inf if mean > 709.78 else math.exp(mean)


class OneStepLate:
    """Holds a step's metrics on the device until the next step is dispatched, so that reading them stalls nothing.
    `push` right after dispatching step n returns (step, host values) of the push before, or None; it starts step n's
    copy to the host in the background. `flush` returns what is left: call it before saving and at the end."""

    _held = None

    def push(self, step: int, values) -> tuple[int, Any] | None:
        for leaf in jax.tree.leaves(values):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        return self._swap((step, values))

    def flush(self) -> tuple[int, Any] | None:
        return self._swap(None)

    def _swap(self, held) -> tuple[int, Any] | None:
        late, self._held = self._held, held
        return late and (late[0], jax.device_get(late[1]))


PHASES = ("data", "step", "eval", "checkpoint", "compile", "sample", "log", "other")
LOOP = ("data", "step", "log", "other")  # what happens at every step


class Clock:
    """Wall time by phase. `with clock.phase("data", blocked=True): …` counts the time to "data" and as waiting.
    Every moment since the start belongs to exactly one phase ("other" outside of any); a phase inside another takes its
    time from the outer one. `blocked` marks waiting for the device or for the input queue."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds = {(phase, blocked): 0.0 for phase in PHASES for blocked in (False, True)}
        self._stack = [("other", False)]
        self._since = now()

    def _settle(self) -> None:
        moment = self._now()
        self._seconds[self._stack[-1]] += moment - self._since
        self._since = moment

    @contextlib.contextmanager
    def phase(self, name: str, blocked: bool = False):
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: choose one of {', '.join(PHASES)}")
        self._settle()
        self._stack.append((name, blocked))
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def fractions(self) -> dict[str, float]:
        """Part of the wall time of each phase; they sum to 1 (all 0 before any time has passed)."""
        self._settle()
        return self._parts(PHASES, {phase: ((phase, False), (phase, True)) for phase in PHASES})

    def loop_fractions(self) -> dict[str, float]:
        """Parts of the loop's time (LOOP phases). host: not blocked on device or data, its own overhead; data_wait:
        blocked on the input queue, near 0 when input never starves the device."""
        self._settle()
        return self._parts(LOOP, {"host": [(phase, False) for phase in LOOP], "data_wait": [("data", True)]})

    def _parts(self, phases, parts) -> dict[str, float]:
        total = sum(self._seconds[phase, blocked] for phase in phases for blocked in (False, True))
        return {name: sum(self._seconds[key] for key in keys) / (total or 1.0) for name, keys in parts.items()}

    def metrics(self) -> dict[str, float]:
        """Both under their metric names, `time/…`."""
        return {f"time/{name}": part for name, part in {**self.fractions(), **self.loop_fractions()}.items()}


@contextlib.contextmanager
def saving(path: Path):
    """Turns a failure of the disk (full, read-only …) into SaveFailed, one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(f"{path}: cannot be written: {error.strerror}; saved checkpoints are intact") from error


def replace_file(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all: a reader sees the old content or the new. Raises SaveFailed."""
    part = path.with_name(f".{path.name}.part")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _read_lines(path: Path) -> list[tuple[dict, bytes]]:
    *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    pairs = []
    try:
        for line in whole:
            row = json.loads(line)
            pairs.append((row | {"step": int(row["step"])}, line + b"\n"))
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path} line {len(pairs) + 1}: not a JSON object with a step; "
                         "remove the line or move the file away") from None
    return pairs


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of metrics.jsonl; [] without a file. A last line cut by a kill (no newline) is left out; any other line that
    is no JSON object with a `step` raises UsageError naming it."""
    return [row for row, _ in _read_lines(Path(path))]


def to_json_line(step: int, values: Mapping[str, float | str]) -> bytes:
    """One line of strict JSON. nan and infinities become null, and "nonfinite" says which each was."""
    row = {key: value if isinstance(value, str) else float(value) for key, value in values.items()}
    nonfinite = {key: str(v) for key, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    row = {"step": int(step), **row, **dict.fromkeys(nonfinite), **({"nonfinite": nonfinite} if nonfinite else {})}
    # "replace": a lone surrogate, which UTF-8 has no bytes for, becomes a question mark.
    return json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


# Writers share one interface: write(step, {key: number}), text(step, key, str), close().
class JsonlWriter:
    """metrics.jsonl: one JSON object a line. `resumed_at` drops the lines of later steps, so that the curve has no
    overlap; None (nothing was restored) starts an empty file. Raises SaveFailed when the disk is full."""

    def __init__(self, path: str | Path, resumed_at: int | None = None):
        self.path = Path(path)
        lines = [] if resumed_at is None else _read_lines(self.path)
        replace_file(self.path, b"".join(line for row, line in lines if row["step"] <= resumed_at))
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
    """TensorBoard event files in `directory`. On resume TensorBoard is told to drop what came after `resumed_at`."""

    def __init__(self, directory: str | Path, resumed_at: int | None = None):
        from tensorboardX import SummaryWriter  # here, because only runs that log to TensorBoard should pay for it

        self._writer = SummaryWriter(str(directory), purge_step=0 if resumed_at is None else resumed_at + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, float(value), step)

    def text(self, step: int, key: str, text: str) -> None:
        text = text.encode("utf-8", "replace").decode().replace("\n", "\n    ")
        self._writer.add_text(key, "    " + text, step)  # rendered as markdown, where an indented block is verbatim

    def close(self) -> None:
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
    ("train/loss", "loss {:.4f}"), ("eval/loss", "held-out loss {:.4f}"),
    ("eval/bits_per_byte", "{:.4f} bits/byte"), ("throughput/tokens_per_second", "{} tok/s"))


class BarWriter:
    """Progress for a person: a bar on a terminal, else (or with `progress` off) a plain line every `every_seconds`.

    Evaluations and texts are printed in full, above the bar. The plain line's ETA counts from the first write, so that
    compilation is not extrapolated."""

    def __init__(self, total: int, start: int = 0, progress: bool = True, stream: TextIO | None = None,
                 every_seconds: float = 10.0, now: Callable[[], float] = time.monotonic):
        self._total, self._stream, self._every, self._now = total, stream or sys.stderr, every_seconds, now
        self._first = self._printed = self._bar = None
        if progress and self._stream.isatty():
            from tqdm import tqdm

            sized = shutil.get_terminal_size((0, 0)).lines > 0  # on a terminal of 0 x 0 tqdm would show nothing at all
            self._bar = tqdm(total=total, initial=start, file=self._stream, ncols=80, nrows=20, dynamic_ncols=sized,
                             bar_format="{percentage:3.0f}%|{bar}| {n}/{total}  {desc}  {elapsed} < {remaining}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(how.format(human(values[key]) if "second" in key else float(values[key]))
                          for key, how in SHOWN if key in values)
        if any(key.startswith("eval/") for key in values):
            self._line(f"step {step}  {shown}")
        elif self._bar is not None:
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._printed is None or self._now() - self._printed >= self._every or step >= self._total:
            self._printed = moment = self._now()
            self._first = self._first or (step, moment)
            done, left, seconds = step - self._first[0], self._total - step, moment - self._first[1]
            eta = f"  ETA {duration(seconds / done * left)}" if done > 0 and left > 0 else ""
            self._line(f"step {step}/{self._total}  {shown}{eta}")

    def _line(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"  # a narrow terminal must not stop the run
        show = print if self._bar is None else self._bar.write
        show(text.encode(encoding, "replace").decode(encoding), file=self._stream)
        self._stream.flush()

    def text(self, step: int, key: str, text: str) -> None:
        self._line(f"step {step}  {key}\n    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Writers:
    """Several writers as one; none on processes that only compute. `close` closes all, even if one fails."""

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
