"""The pictures of a run: its loss, and what else its steps did."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from gpt_jax.metrics.sessions import find_marks
from gpt_jax.metrics.summary import find_texts, series
from gpt_jax.metrics.writers import human

INK = "#1f2933"
MUTED = "#7b8794"
TRAIN = "#8fb3d9"
TREND = "#2b6cb0"
EVAL = "#d1495b"
PHASE_COLORS = {
    "data": "#e0a458",
    "step": TREND,
    "eval": EVAL,
    "checkpoint": "#7a5195",
    "compile": "#3d8b7d",
    "sample": "#b07aa1",
    "log": "#9aa5b1",
    "other": "#dfe3e8",
}
LINE_COLORS = (TREND, EVAL, "#3d8b7d", "#e0a458", "#7a5195", "#b07aa1", "#9aa5b1")

FEWEST_TO_SMOOTH = 8  # points; fewer are shown alone
REACHES = 16  # a smoothed point looks at two of so many parts of the curve


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """At each place the line through the finite values at most `reach` to either side.

    A line instead of a mean: it neither lags at the ends of a falling curve nor ends on one value.
    Places with nothing finite around give nan.
    """
    heights = np.asarray(values, np.float64)
    known = np.isfinite(heights)
    places = np.arange(len(heights), dtype=np.float64)
    begins = np.maximum(places.astype(int) - reach, 0)
    ends = np.minimum(places.astype(int) + reach + 1, len(heights))

    def window_sums(terms):
        sums = np.concatenate([[0.0], np.cumsum(np.where(known, terms, 0.0))])
        return sums[ends] - sums[begins]

    filled = np.where(known, heights, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        count = window_sums(np.ones_like(filled))
        place = window_sums(places) / count
        height = window_sums(filled) / count
        spread = window_sums(places**2) / count - place**2
        common = window_sums(places * filled) / count - place * height
        slope = np.where(spread > 1e-6, common / np.maximum(spread, 1e-6), 0.0)
        return (height + slope * (places - place)).tolist()


def draw_loss(rows: Sequence[Mapping]) -> bytes:
    """PNG, 1280 x 720: train and held-out loss over steps and tokens.

    Train losses are faint, and their trend is dark. Resumes and changed rates are marked.
    """
    figure, (axes,) = _make_figure((8, 4.5), panels=1)
    _style(axes, "loss (nats per token)")
    _draw_train(axes, rows)
    _draw_heldout(axes, rows)

    if axes.lines:
        _draw_marks(axes, rows)
        axes.legend(frameon=False, labelcolor=INK)
        axes.margins(x=0.02)
        _draw_tokens_axis(axes, rows)
    else:
        axes.set_axis_off()
        text = "no step has been logged yet"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED)
    return _to_png(figure)


def draw_details(rows: Sequence[Mapping], sets: Sequence[str] = ()) -> bytes | None:
    """PNG with a small panel for each of rate, gradient norm, loss by source and set, expert load.

    `sets` are the names of config.eval.sets. Panels without data are left out. None where no panel
    is left.
    """
    by_source, by_set = find_texts(rows, sets)
    panels = {
        "learning rate": {"": series(rows, "train/learning_rate")},
        "gradient norm": {"": series(rows, "train/grad_norm")},
        "held-out loss by source": {
            source: series(rows, f"eval/{source}/loss") for source in by_source
        },
        "held-out loss by set": {name: series(rows, f"eval/{name}/loss") for name in by_set},
        "load of an expert (1 is an equal share)": {
            "largest": series(rows, "moe/load_max"),
            "smallest": series(rows, "moe/load_min"),
        },
    }
    panels = {
        title: lines for title, lines in panels.items() if any(steps for steps, _ in lines.values())
    }
    if not panels:
        return None

    height = 2.4 * math.ceil(len(panels) / 2)
    figure, all_axes = _make_figure((8, height), len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, title, lines)
        _draw_marks(axes, rows, labels=False)
    return _to_png(figure)


def _make_figure(size: tuple[float, float], panels: int):
    """A figure and its axes, at most two side by side."""
    # Imported here because only a report should pay the half second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    columns = min(panels, 2)
    lines = math.ceil(panels / columns)
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(panels)]


def _style(axes, ylabel: str) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0, pad=6)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")


def _draw_train(axes, rows: Sequence[Mapping]) -> None:
    steps, losses = series(rows, "train/loss")
    if not steps:
        return
    if len(steps) < FEWEST_TO_SMOOTH:
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, losses, color=TREND, linewidth=1.8, marker=marker, label="train")
        return

    axes.plot(steps, losses, color=TRAIN, linewidth=0.8, alpha=0.7)
    trend = smooth(losses, max(2, len(steps) // REACHES))
    axes.plot(steps, trend, color=TREND, linewidth=2, label="train (smoothed)")


def _draw_heldout(axes, rows: Sequence[Mapping]) -> None:
    steps, losses = series(rows, "eval/loss")
    if not steps:
        return
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


def _draw_marks(axes, rows: Sequence[Mapping], labels: bool = True) -> None:
    """A dotted line at each resume. Resumes with the same label share one entry of the legend."""
    named = set()
    for step, label in find_marks(rows):
        shown = label if labels and label not in named else None
        named.add(label)
        color = EVAL if "rate" in label else MUTED
        axes.axvline(step, color=color, linewidth=1, linestyle=":", label=shown)


def _draw_tokens_axis(axes, rows: Sequence[Mapping]) -> None:
    """Tokens seen along the top, where steps and tokens are proportional.

    They are while the batch stays the same.
    """
    counts = zip(*series(rows, "throughput/tokens_seen"), strict=True)
    pairs = [(step, tokens) for step, tokens in counts if step > 0]
    if len(pairs) < 2:
        return
    rate = pairs[-1][1] / pairs[-1][0]
    if any(abs(tokens - rate * step) > 0.02 * rate * step for step, tokens in pairs):
        return

    top = axes.secondary_xaxis("top", functions=(lambda s: s * rate, lambda t: t / rate))
    top.set_xlabel("tokens seen", color=MUTED, fontsize=9)
    top.xaxis.set_major_formatter(lambda tokens, _: re.sub(r"\.0(?=\D|$)", "", human(tokens)))
    top.tick_params(colors=MUTED, length=0, labelsize=9)
    top.spines["top"].set_visible(False)


def _draw_panel(axes, title: str, lines: Mapping[str, tuple[list, list]]) -> None:
    """One small picture; a legend where it has several lines."""
    _style(axes, "")
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel("")
    for i, (name, (steps, values)) in enumerate(lines.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        marker = "o" if len(steps) < 3 else None
        axes.plot(steps, values, color=color, linewidth=1.3, marker=marker, label=name)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def _to_png(figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
