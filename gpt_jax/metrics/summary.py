"""The numbers of a finished run, and the lines that tell them."""

import contextlib
import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_jax.metrics.clock import PHASES
from gpt_jax.metrics.sessions import find_sessions
from gpt_jax.metrics.writers import duration, human

LIBRARIES = (  # those that shape a run's numbers
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
)
SOURCE_METRIC = re.compile(r"eval/(.+)/([a-z_]+)")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a run. None leaves a line out.

    Rates are of the whole run. Fractions go from 0 to 1, and are of the last session.
    """

    bits_per_byte: float | None = None  # on held-out text
    xz_bits_per_byte: float | None = None  # of `xz -9` on the same text
    eval_loss: float | None = None  # nats a token
    train_loss: float | None = None  # nats a token, the mean of the last line's steps
    parameters: int | None = None
    steps: int | None = None
    tokens_seen: float | None = None
    tokens_per_second: float | None = None
    mfu_full: float | None = None
    mfu_causal: float | None = None
    peak: str | None = None  # a line about the hardware's peak
    wall_seconds: float | None = None  # of all sessions
    sessions: int | None = None
    host: float | None = None  # parts of the loop's time, see Clock
    data_wait: float | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)  # parts of the wall time


def series(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of `key`. A null, which was nan or infinite, comes back as nan."""
    steps = []
    values = []
    for row in rows:
        if key in row:
            steps.append(row["step"])
            values.append(math.nan if row[key] is None else row[key])
    return steps, values


def last_value(rows: Sequence[Mapping], key: str) -> float | None:
    values = series(rows, key)[1]
    return values[-1] if values else None


def median_value(rows: Sequence[Mapping], key: str) -> float | None:
    values = sorted(value for value in series(rows, key)[1] if math.isfinite(value))
    return values[len(values) // 2] if values else None


def summarize(rows: Sequence[Mapping], **facts) -> Summary:
    """A Summary of rows of metrics.jsonl.

    It takes last values, and medians for rates because the first window holds compilation. `facts`
    are fields that the rows do not hold, such as `parameters`, or that overrule them.
    """
    phases = {phase: last_value(rows, f"time/{phase}") for phase in PHASES}
    values: dict[str, Any] = dict(
        bits_per_byte=last_value(rows, "eval/bits_per_byte"),
        eval_loss=last_value(rows, "eval/loss"),
        train_loss=last_value(rows, "train/loss"),
        steps=rows[-1]["step"] if rows else None,
        tokens_seen=last_value(rows, "throughput/tokens_seen"),
        tokens_per_second=median_value(rows, "throughput/tokens_per_second"),
        mfu_full=median_value(rows, "throughput/mfu_full"),
        mfu_causal=median_value(rows, "throughput/mfu_causal"),
        wall_seconds=last_value(rows, "time/wall_seconds"),
        sessions=len(find_sessions(rows)) or None,
        host=last_value(rows, "time/host"),
        data_wait=last_value(rows, "time/data_wait"),
        phases={phase: part for phase, part in phases.items() if part},
    )
    return Summary(**(values | facts))


def find_samples(rows: Sequence[Mapping]) -> list[dict]:
    """The texts written as `sample/<n>`, those before a resume included: {step, text}."""
    return [
        {"step": row["step"], "text": row[key]}
        for row in rows
        for key in row
        if key.startswith("sample/")
    ]


def find_sources(rows: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """{source: {metric: last value}} of a run with several sources; {} of any other."""
    sources: dict[str, dict[str, float]] = {}
    for row in rows:
        for key, value in row.items():
            match = SOURCE_METRIC.fullmatch(key)
            if match:
                source, metric = match.groups()
                sources.setdefault(source, {})[metric] = math.nan if value is None else value
    return sources


def find_texts(
    rows: Sequence[Mapping], sets: Sequence[str] = ()
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """The sources, see `find_sources`, without the held-out sets, and the sets in the same form.

    `sets` are the names of config.eval.sets. A folder of several sources makes several of a name.
    """
    texts = find_sources(rows)
    of_sets = {name: row for name, row in texts.items() if name.split("/")[0] in sets}
    return {name: row for name, row in texts.items() if name not in of_sets}, of_sets


def library_versions() -> dict[str, str]:
    """Name -> version of the installed libraries that shape a run's numbers."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def compare_with_xz(ours: float | None, xz: float | None) -> str:
    if ours is None or not xz:
        return ""
    word = "better" if ours < xz else "WORSE"
    return f"xz -9: {xz:.4f}, the model is {abs(1 - ours / xz):.1%} {word}"


def headlines(summary: Summary) -> list[tuple[str, str, str]]:
    """(label, value, note) of every number that is known, the most wanted first."""
    s = summary
    sessions = f"in {s.sessions} sessions" if s.sessions and s.sessions > 1 else ""
    rows = [
        (
            "held-out bits per byte",
            s.bits_per_byte,
            "{:.4f}",
            compare_with_xz(s.bits_per_byte, s.xz_bits_per_byte),
        ),
        ("held-out loss", s.eval_loss, "{:.4f}", "nats per token"),
        ("train loss", s.train_loss, "{:.4f}", "mean of the steps of the last line"),
        ("parameters", s.parameters and human(s.parameters), "{}", f"{s.parameters or 0:,}"),
        ("steps", s.steps, "{:,}", ""),
        ("tokens seen", s.tokens_seen and human(s.tokens_seen), "{}", ""),
        ("tokens per second", s.tokens_per_second and human(s.tokens_per_second), "{}", "median"),
        ("MFU, full map", s.mfu_full, "{:.1%}", s.peak or ""),
        ("MFU, causal", s.mfu_causal, "{:.1%}", "attention term halved"),
        ("wall time", s.wall_seconds and duration(s.wall_seconds), "{}", sessions),
        ("host overhead", s.host, "{:.2%}", "of the loop, not blocked on device or data"),
        ("waiting for data", s.data_wait, "{:.2%}", "of the loop"),
    ]
    if s.mfu_full is None and s.peak:
        rows.append(("MFU", "not reported", "{}", s.peak))
    return [
        (label, how.format(value), note) for label, value, how, note in rows if value is not None
    ]


def format_summary(summary: Summary, where: Mapping[str, str | Path] | None = None) -> list[str]:
    """The end of a run for the terminal: aligned numbers, the split of the time, and paths.

    `where` says what was written, and its path.
    """
    rows = []
    for label, value, note in headlines(summary):
        rows.append((label, f"{value}  ({note})" if note else value))

    split = [f"{phase} {part:.1%}" for phase, part in by_size(summary.phases)]
    if split:
        rows.append(("time", ", ".join(split)))
    for name, path in (where or {}).items():
        rows.append((name, str(path)))

    width = max((len(label) for label, _ in rows), default=0)
    return [f"{label:<{width}}  {text}" for label, text in rows]


def by_size(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    """(phase, part) of the phases that took time, the largest first."""
    pairs = [(phase, part) for phase, part in phases.items() if part > 0]
    return sorted(pairs, key=lambda pair: -pair[1])
