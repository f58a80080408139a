"""What a run leaves for people: loss.png, a report.html that stands alone, a summary for the
terminal (floor 3).

Called by gpt_jax/commands at the end of a run, and good at any moment of it: whatever is missing is
left out. All is read from the workdir's metrics.jsonl and config.json or passed in; nothing is
fetched, and the page links to nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_jax.metrics.page import make_html
from gpt_jax.metrics.plot import draw_loss
from gpt_jax.metrics.summary import Summary
from gpt_jax.metrics.writers import read_jsonl, save_file


def write_loss_png(workdir: str | Path) -> Path:
    """Draws `workdir`/metrics.jsonl into `workdir`/loss.png and returns its path."""
    path = Path(workdir) / "loss.png"
    save_file(path, draw_loss(read_jsonl(path.with_name("metrics.jsonl"))))
    return path


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
    save_file(path := Path(workdir) / "report.html", page.encode("utf-8"))
    return path
