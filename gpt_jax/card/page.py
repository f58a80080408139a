"""A card as Markdown and as JSON, and the table of many cards."""

from collections.abc import Sequence
from typing import Any

from gpt_jax import config as configs
from gpt_jax.card.checks import CHECKS, Card
from gpt_jax.card.finding import FAIL, NOT_CHECKED
from gpt_jax.card.shrink import RULE

SHAPE_SECTIONS = ("model", "train")


def to_data(card: Card) -> dict[str, Any]:
    """What the pages are made of, for JSON."""
    findings = [{**finding._asdict(), "date": card.date} for finding in card.findings]
    return {
        "name": card.name,
        "date": card.date,
        "weights": "the checkpoint's" if card.has_weights else "random",
        "shapes": list_shapes(card.row, card.checked),
        "findings": findings,
    }


def list_shapes(row: configs.Config, checked: configs.Config) -> list[list[str]]:
    """[field, value of the row, value that was checked] of each field of the shape that differs."""
    old = configs.flatten(row)
    new = configs.flatten(checked)
    return [
        [key, repr(old[key]), repr(new[key])]
        for key in new
        if key.partition(".")[0] in SHAPE_SECTIONS and key in old and old[key] != new[key]
    ]


def format_page(data: dict[str, Any]) -> str:
    """The page of one card."""
    lines = [
        f"# {data['name']}",
        "",
        f"A program made this page on {data['date']}, on a CPU. The weights were "
        f"{data['weights']} at the start of the run.",
        "",
        "| check | verdict | figure | date |",
        "|---|---|---|---|",
    ]
    for finding in data["findings"]:
        cells = (finding["name"], finding["verdict"], finding["figure"], finding["date"])
        lines.append("| " + " | ".join(map(escape_cell, cells)) + " |")

    lines += ["", "## How each was checked", ""]
    lines += [f"- **{finding['name']}**: {finding['how']}" for finding in data["findings"]]
    lines += ["", "## The two shapes", "", *format_shapes(data["shapes"])]
    return "\n".join(lines) + "\n"


def format_shapes(shapes: Sequence[Sequence[str]]) -> list[str]:
    """The rule of shrinking, and what it has changed."""
    if not shapes:
        return ["The checks ran on the row's own shape."]
    lines = [
        "`fits` is about the row's own shape. All other checks ran on a shape that was shrunk by "
        "this rule:",
        "",
        *(f"- {sentence}" for sentence in RULE),
        "",
        "| field | row | checked |",
        "|---|---|---|",
    ]
    return lines + ["| " + " | ".join(map(escape_cell, shape)) + " |" for shape in shapes]


def format_summary(cards: Sequence[dict[str, Any]], folder: str = "") -> str:
    """A table with a line for each card. With `folder` its name links to the page there."""
    names = list(CHECKS)
    lines = [
        "| row | " + " | ".join(names) + " | date |",
        "|---" * (len(names) + 2) + "|",
    ]
    for data in cards:
        verdicts = {finding["name"]: finding["verdict"] for finding in data["findings"]}
        marks = [mark_verdict(verdicts.get(name, "")) for name in names]
        title = data["name"]
        if folder:
            title = f"[{title}]({folder}/{name_file(title)})"
        lines.append(f"| {title} | " + " | ".join(marks) + f" | {data['date']} |")
    return "\n".join(lines)


def mark_verdict(verdict: str) -> str:
    """What the summary shows for a verdict."""
    return "-" if verdict == NOT_CHECKED else verdict


def name_file(name: str) -> str:
    """The file of a row's page: `configs/gpt2.py:124m` -> `gpt2-124m.md`."""
    path, _, variant = name.partition(":")
    stem = path.rpartition("/")[2].removesuffix(".py")
    return f"{stem}-{variant}.md" if variant else f"{stem}.md"


def escape_cell(text: str) -> str:
    """A text that is one cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def list_failed(data: dict[str, Any]) -> list[str]:
    """The checks of a card that fail."""
    return [finding["name"] for finding in data["findings"] if finding["verdict"] == FAIL]
