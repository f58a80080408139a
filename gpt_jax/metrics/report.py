"""What a run leaves for people: loss.png, and a report.html that stands alone.

Both can be made at any moment of a run: whatever is missing is left out. All is read from the
workdir's metrics.jsonl and config.json, or passed in. The page links to nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_jax.errors import complain
from gpt_jax.metrics.page import make_html
from gpt_jax.metrics.plot import draw_loss
from gpt_jax.metrics.summary import Summary
from gpt_jax.metrics.writers import read_jsonl, save_file
from gpt_jax.schema import read_json


def write_loss_png(workdir: str | Path) -> Path:
    """Draws `workdir`/metrics.jsonl into `workdir`/loss.png, and returns its path."""
    path = Path(workdir) / "loss.png"
    save_file(path, draw_loss(read_jsonl(path.with_name("metrics.jsonl"))))
    return path


def _read_config(path: Path) -> dict:
    """The config in a workdir; {}, and a line that says so, if it cannot be read."""
    try:
        return read_json(path.read_bytes(), "object")
    except (OSError, ValueError) as error:
        complain(f"{path}: cannot be read ({error}), so the report is without it")
        return {}


def write_report(
    workdir: str | Path,
    *,
    title: str,
    summary: Summary,
    samples: Sequence[Mapping] = (),
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Writes `workdir`/loss.png and report.html, and returns the page's path.

    `samples` are {step, text} each, in order, as `find_samples` gives them. `versions` is
    name -> text, device first. A workdir without metrics.jsonl or config.json will do. Raises
    SaveFailed.
    """
    folder = Path(workdir)
    png = write_loss_png(folder).read_bytes()

    config_file = folder / "config.json"
    config = _read_config(config_file) if config_file.exists() else {}
    rows = read_jsonl(folder / "metrics.jsonl")
    page = make_html(title, summary, png, rows, samples, config, versions or {})
    path = folder / "report.html"
    save_file(path, page.encode("utf-8"))
    return path
