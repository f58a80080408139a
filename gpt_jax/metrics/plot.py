"""`loss.png`, the picture of a run."""

import io
import math
import re
from collections.abc import Mapping, Sequence

from gpt_jax.metrics.clock import PHASES
from gpt_jax.metrics.summary import series
from gpt_jax.metrics.writers import human

INK, MUTED, TRAIN, TREND, EVAL = "#1f2933", "#7b8794", "#8fb3d9", "#2b6cb0", "#d1495b"
PHASE_COLORS = dict(
    zip(PHASES, ("#e0a458", TREND, EVAL, "#7a5195", "#3d8b7d", "#b07aa1", "#9aa5b1", "#dfe3e8"))
)


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
