"""A classification as one page that stands alone: values with their intervals, and confusion."""

from gpt_jax.evals.classification import BINS, LEVEL, Measured, tabulate_confusion
from gpt_jax.metrics import format_table, make_page

NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": f"expected calibration error, {BINS} bins",
}


def make_classification_page(measured: Measured, title: str, subtitle: str) -> str:
    """The HTML of a page. All texts are escaped, and nothing is loaded from elsewhere."""
    rows = []
    for name, value in measured.values.items():
        low, high = measured.intervals[name]
        rows.append([NAMES[name], f"{value:.4f}", f"{low:.4f} to {high:.4f}"])
    counts = [
        ["rows", str(measured.rows), ""],
        ["rows whose scores are not finite", str(measured.not_finite), ""],
    ]
    header = ["measure", "value", f"{LEVEL:.0%} of resampled rows"]
    head, *lines = tabulate_confusion(measured)
    body = f'<div class="card">{format_table(header, [*rows, *counts])}</div>'
    body += f'<h2>Confusion</h2><div class="card">{format_table(head, lines)}</div>'
    return make_page(title, subtitle, body)
