"""What a run leaves for people: loss.png, a report.html that stands alone, a summary for the
terminal (floor 3).

Called by gpt_jax/commands at the end of a run, and good at any moment of it: whatever is missing is
left out. All is read from the workdir's metrics.jsonl and config.json or passed in; nothing is
fetched, and the page links to nothing.
"""

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.metrics import PHASES
from gpt_jax.writers import duration, human, read_jsonl, replace_file

INK, MUTED, TRAIN, TREND, EVAL = "#1f2933", "#7b8794", "#8fb3d9", "#2b6cb0", "#d1495b"
PHASE_COLORS = dict(
    zip(PHASES, ("#e0a458", TREND, EVAL, "#7a5195", "#3d8b7d", "#b07aa1", "#9aa5b1", "#dfe3e8"))
)


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


def samples_in(rows: Sequence[Mapping]) -> list[dict]:
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


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean of the finite values at most `reach` to either side, fewer near the ends so that
    nothing lags."""
    out = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        near = [v for v in values[i - side : i + side + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def _style(axes) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0, pad=6)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")


def _tokens_axis(axes, rows: Sequence[Mapping]) -> None:
    """Tokens seen along the top, when steps and tokens are proportional (they are while the
    batch stays the same)."""
    pairs = [
        (step, tokens) for step, tokens in zip(*series(rows, "throughput/tokens_seen")) if step > 0
    ]
    if len(pairs) < 2:
        return
    rate = pairs[-1][1] / pairs[-1][0]
    if all(abs(tokens - rate * step) <= 0.02 * rate * step for step, tokens in pairs):
        top = axes.secondary_xaxis("top", functions=(lambda s: s * rate, lambda t: t / rate))
        top.set_xlabel("tokens seen", color=MUTED, fontsize=9)
        top.xaxis.set_major_formatter(lambda tokens, _: re.sub(r"\.0(?=\D|$)", "", human(tokens)))
        top.tick_params(colors=MUTED, length=0, labelsize=9)
        top.spines["top"].set_visible(False)


def draw_loss(rows: Sequence[Mapping]) -> bytes:
    """PNG, 1280 x 720: train loss (points faint, their running mean dark) and held-out loss over
    steps and tokens."""
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # here: half a second that only a report should pay
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _style(axes)
    steps, losses = series(rows, "train/loss")
    many, few = len(steps) > 60, "o" if len(steps) < 3 else None
    if steps:
        axes.plot(
            steps,
            losses,
            color=TRAIN if many else TREND,
            linewidth=0.8 if many else 1.8,
            marker=few,
            alpha=0.7 if many else 1.0,
            label=None if many else "train",
        )
    if many:
        axes.plot(
            steps,
            smooth(losses, max(3, len(steps) // 60)),
            color=TREND,
            linewidth=2,
            label="train (mean)",
        )
    steps, losses = series(rows, "eval/loss")
    if steps:
        axes.plot(
            steps,
            losses,
            color=EVAL,
            linewidth=2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label="held-out",
        )
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right",
            color=EVAL,
            fontweight="bold",
        )
    if axes.lines:
        axes.legend(frameon=False, labelcolor=INK)
        axes.margins(x=0.02)
        _tokens_axis(axes, rows)
    else:
        axes.set_axis_off()
        axes.text(
            0.5,
            0.5,
            "no step has been logged yet",
            transform=axes.transAxes,
            ha="center",
            color=MUTED,
        )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def write_loss_png(workdir: str | Path) -> Path:
    """Draws `workdir`/metrics.jsonl into `workdir`/loss.png and returns its path."""
    path = Path(workdir) / "loss.png"
    replace_file(path, draw_loss(read_jsonl(path.with_name("metrics.jsonl"))))
    return path


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


def summary_lines(summary: Summary, where: Mapping[str, str | Path] | None = None) -> list[str]:
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


CSS = """
body{margin:0;background:#f5f7fa;color:#1f2933;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere} .sub{color:#7b8794;margin:.3rem 0 1.8rem}
h2{font-size:1.1rem;margin:2.4rem 0 .8rem} h3{font-size:.9rem;margin:1.1rem 0 .2rem;color:#52606d}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.75rem}
.tile,.card{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.tile{padding:.8rem 1rem} .tile b{display:block;font-size:1.5rem;line-height:1.35;font-variant-numeric:tabular-nums}
.tile span{color:#52606d;font-size:.85rem} .tile small{display:block;color:#7b8794;font-size:.78rem;line-height:1.4}
.tile.first{border-color:#d1495b} .tile.first b{color:#d1495b}
.card{padding:1rem;margin:0 0 .75rem} .card img{display:block;width:100%;height:auto}
.step{color:#7b8794;font-size:.82rem;margin:0 0 .4rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"Noto Sans Mono CJK SC",monospace} pre+pre{border-top:1px dashed #e4e7eb;margin-top:.7rem;padding-top:.7rem}
.bar{display:flex;height:1.1rem;border-radius:6px;overflow:hidden;margin-bottom:.7rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.88rem;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin-right:.4rem;vertical-align:-1px}
summary{cursor:pointer;font-weight:600} table{border-collapse:collapse;width:100%;font-size:.88rem}
td{padding:.22rem .8rem .22rem 0;vertical-align:top;border-top:1px solid #f0f2f5;overflow-wrap:anywhere}
td:first-child{color:#52606d;width:15rem}
"""


def _text(value) -> str:
    """Escaped for HTML; control characters a byte-level model may emit become the replacement
    character."""
    clean = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value).replace("\r\n", "\n")
    )
    return html.escape(clean)


def _table(values: Mapping) -> str:
    rows = (
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _tiles(summary: Summary) -> str:
    tiles = [
        f'<div class="tile{" first" if label == "held-out bits per byte" else ""}"><span>{_text(label)}</span>'
        f"<b>{_text(value)}</b><small>{_text(note)}</small></div>"
        for label, value, note in headlines(summary)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _samples(samples: Sequence[Mapping], shown: int = 8) -> str:
    """Samples by step; when there are many, `shown` steps spread evenly, the first and the last
    among them."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return ""
    chosen = (
        [steps[i * (len(steps) - 1) // (shown - 1)] for i in range(shown)]
        if len(steps) > shown
        else steps
    )
    note = (
        f" ({shown} of {len(steps)} times; all are in metrics.jsonl)" if len(steps) > shown else ""
    )
    cards = []
    for step in chosen:
        texts = "".join(f"<pre>\n{_text(s['text'])}</pre>" for s in samples if s["step"] == step)
        cards.append(f'<div class="card"><p class="step">step {step:,}</p>{texts}</div>')
    return f"<h2>Samples over time{note}</h2>{''.join(cards)}"


def _time_split(phases: Mapping[str, float]) -> str:
    parts = _by_size(phases)
    if not parts:
        return ""
    bar, legend = (
        "".join(
            form.format(color=PHASE_COLORS[phase], part=part, phase=phase) for phase, part in parts
        )
        for form in (
            '<div style="width:{part:.3%};background:{color}"></div>',
            '<span><i style="background:{color}"></i>{phase} {part:.1%}</span>',
        )
    )
    card = f'<div class="card"><div class="bar">{bar}</div><div class="legend">{legend}</div></div>'
    return f"<h2>Where the time went</h2>{card}"


def _config(config: Mapping) -> str:
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = "".join(
        f"<h3>{_text(name)}</h3>{_table(section)}"
        for name, section in config.items()
        if isinstance(section, Mapping)
    )
    return (
        f'<details class="card"><summary>Configuration</summary>{_table(top)}{sections}</details>'
    )


def make_html(
    title: str,
    summary: Summary,
    png: bytes,
    samples: Sequence[Mapping],
    config: Mapping,
    versions: Mapping[str, str],
) -> str:
    """One HTML page that needs nothing else: no script, no link, the picture inside. All texts
    are escaped."""
    picture = base64.b64encode(png).decode()
    details = _config(config) if config else ""
    if versions:
        details += f'<details class="card" open><summary>Device and versions</summary>{_table(versions)}</details>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head>'
        f'<body><main><h1>{_text(title)}</h1><p class="sub">trained with gpt_jax</p>{_tiles(summary)}'
        f'<h2>Loss</h2><div class="card"><img alt="loss over steps" src="data:image/png;base64,{picture}"></div>'
        f"{_samples(samples)}{_time_split(summary.phases)}"
        f"{f'<h2>The run</h2>{details}' if details else ''}</main></body></html>\n"
    )


def write_report(
    workdir: str | Path,
    *,
    title: str,
    summary: Summary,
    samples: Sequence[Mapping] = (),
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Writes `workdir`/loss.png and report.html; returns the page's path.

    `summary`: see `summarize`. `samples`: {step, text} each, in order; see `samples_in`.
    `versions`: name -> text, device first. Works with a workdir that has no metrics.jsonl or
    config.json yet. Raises SaveFailed."""
    png, config = write_loss_png(workdir).read_bytes(), Path(workdir) / "config.json"
    values = json.loads(config.read_text("utf-8")) if config.exists() else {}
    page = make_html(title, summary, png, samples, values, versions or {})
    replace_file(path := Path(workdir) / "report.html", page.encode("utf-8"))
    return path
