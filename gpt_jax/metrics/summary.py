"""The numbers of a finished run, and the lines that tell them."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.metrics.clock import PHASES
from gpt_jax.metrics.writers import duration, human


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of a run; None leaves a line out. Rates are of the whole run, fractions from 0
    to 1."""

    bits_per_byte: float | None = None  # on held-out text
    xz_bits_per_byte: float | None = None  # of `xz -9` on the same text
    eval_loss: float | None = None  # nats a token
    train_loss: float | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens_seen: float | None = None
    tokens_per_second: float | None = None
    mfu_full: float | None = None
    mfu_causal: float | None = None
    peak: str | None = None  # the line of devices.Peak
    wall_seconds: float | None = None
    host: float | None = None  # parts of the loop's time, see metrics.Clock
    data_wait: float | None = None
    phases: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # part of the wall time of each phase


def series(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of `key`; null (it was nan or infinite) comes back as nan."""
    pairs = [
        (row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def summarize(rows: Sequence[Mapping], **facts) -> Summary:
    """A Summary of metrics.jsonl rows: last values, and medians for rates (the first window
    holds compilation). `facts` are fields that the rows do not hold (parameters,
    xz_bits_per_byte, peak, wall_seconds) or overrule them."""

    def last(key):
        values = series(rows, key)[1]
        return values[-1] if values else None

    def median(key):
        values = sorted(value for value in series(rows, key)[1] if math.isfinite(value))
        return values[len(values) // 2] if values else None

    phases = {phase: last(f"time/{phase}") for phase in PHASES}
    found = dict(
        bits_per_byte=last("eval/bits_per_byte"),
        eval_loss=last("eval/loss"),
        train_loss=last("train/loss"),
        steps=rows[-1]["step"] if rows else None,
        tokens_seen=last("throughput/tokens_seen"),
        tokens_per_second=median("throughput/tokens_per_second"),
        mfu_full=median("throughput/mfu_full"),
        mfu_causal=median("throughput/mfu_causal"),
        host=last("time/host"),
        data_wait=last("time/data_wait"),
        phases={phase: part for phase, part in phases.items() if part},
    )
    return Summary(**{**found, **facts})


def find_samples(rows: Sequence[Mapping]) -> list[dict]:
    """The texts written as `sample/<n>` in metrics.jsonl, those before a resume included: {step,
    text}."""
    return [
        {"step": row["step"], "text": row[key]}
        for row in rows
        for key in row
        if key.startswith("sample/")
    ]


def library_versions() -> dict[str, str]:
    """Name -> version of the installed libraries that shape a run's numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
    found = {
        dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()
    }
    return {name: found[name] for name in names if name in found}


def _against_xz(ours: float, xz: float) -> str:
    return f"xz -9: {xz:.4f}, the model is {abs(1 - ours / xz):.1%} {'better' if ours < xz else 'WORSE'}"


def headlines(s: Summary) -> list[tuple[str, str, str]]:
    """(label, value, note) of every number that is known, the most wanted first."""
    xz = s.bits_per_byte is not None and s.xz_bits_per_byte
    rows = (
        (
            "held-out bits per byte",
            s.bits_per_byte,
            "{:.4f}",
            _against_xz(s.bits_per_byte, xz) if xz else "",
        ),
        ("held-out loss", s.eval_loss, "{:.4f}", "nats per token"),
        ("train loss", s.train_loss, "{:.4f}", "last logged"),
        ("parameters", s.parameters and human(s.parameters), "{}", f"{s.parameters or 0:,}"),
        ("steps", s.steps, "{:,}", ""),
        ("tokens seen", s.tokens_seen and human(s.tokens_seen), "{}", ""),
        ("tokens per second", s.tokens_per_second and human(s.tokens_per_second), "{}", "median"),
        ("MFU, full map", s.mfu_full, "{:.1%}", s.peak or ""),
        ("MFU, causal", s.mfu_causal, "{:.1%}", "attention term halved"),
        ("wall time", s.wall_seconds and duration(s.wall_seconds), "{}", ""),
        ("host overhead", s.host, "{:.2%}", "of the loop, not blocked on device or data"),
        ("waiting for data", s.data_wait, "{:.2%}", "of the loop"),
    )
    if s.mfu_full is None and s.peak:
        rows += (("MFU", "not reported", "{}", s.peak),)
    return [
        (label, how.format(value), note) for label, value, how, note in rows if value is not None
    ]


def format_summary(summary: Summary, where: Mapping[str, str | Path] | None = None) -> list[str]:
    """The end of a run for the terminal: aligned numbers, the split of the time, and `where`
    things were written."""
    rows = [
        (label, value, f"  ({note})" if note else "") for label, value, note in headlines(summary)
    ]
    split = ", ".join(f"{phase} {part:.1%}" for phase, part in _by_size(summary.phases))
    rows += [("time", split, "")] * bool(split) + [
        (name, str(path), "") for name, path in (where or {}).items()
    ]
    width = max((len(label) for label, _, _ in rows), default=0)
    return [f"{label:<{width}}  {value}{note}" for label, value, note in rows]


def _by_size(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(
        ((phase, part) for phase, part in phases.items() if part > 0), key=lambda pair: -pair[1]
    )
