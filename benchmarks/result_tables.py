"""The tables of docs/results.md that are made of JSON files in this folder.

    python benchmarks/result_tables.py           # prints them
    python benchmarks/result_tables.py --write   # puts each into the page, below its heading

A table is named by its heading. `tests/test_result_pages.py` holds the page to these tables.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/results.md"
WAYS = ("whole rows", "behind the text")
STEPS = {
    "directory to checkpoint": "to a checkpoint",
    "checkpoint to directory": "to a directory",
}


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace(" --- ", "---")


def make_harness() -> str:
    head = ("requests", "number", "tokens", "ours, s", "HFLM, s", "ratio (lowest, highest)")
    head = (*head, "first pass, s", "largest difference, nats", "greedy alike")
    rows = []
    for kind, one in read("harness")["kinds"].items():
        low, high = one["ratio lowest and highest"]
        first = one["first seconds"]
        row = [kind, str(one["requests"]), f"{one['tokens']:,}"]
        row += [f"{one['seconds'][which]:.1f}" for which in ("ours", "hflm")]
        row += [f"{one['ratio']:.1f} ({low:.1f}, {high:.1f})"]
        row += [f"{first['ours']:.1f}, {first['hflm']:.1f}"]
        row += [f"{one['largest difference']:.1e}", "yes" if one["greedy alike"] else "no"]
        rows.append(row)
    return format_table(head, rows)


def make_tasks() -> str:
    head = ["task", "requests"]
    head += [f"{metric}, {who}" for metric in ("acc", "acc_norm") for who in ("native", "HFLM")]
    rows = []
    for name, one in read("harness_tasks")["tasks"].items():
        row = [name.removeprefix("local_"), str(one["requests"])]
        for metric in ("acc", "acc_norm"):
            row += [format_metric(one[which], metric) for which in ("ours", "hflm")]
        rows.append([*row, f"{one['largest difference']:.1e}"])
    return format_table([*head, "largest difference, nats"], rows)


def format_metric(values: dict, metric: str) -> str:
    if metric not in values:
        return "-"
    return f"{values[metric]:.3f} ± {values[f'{metric}_stderr']:.3f}"


def make_prefixes() -> str:
    head = ["text, question"]
    for unit in ("padded tokens", "CPU s"):
        head += [f"{unit}, {way}" for way in WAYS]
    rows = []
    for one in read("prefixes")["rows"]:
        text, question, _ = one["case"]
        row = [f"{text}, {question}"]
        row += [f"{one['tokens'][way]:,}" for way in WAYS]
        row += [f"{one['cpu seconds'][way]:.1f}" for way in WAYS]
        whole, behind = (one["cpu seconds"][way] / one["tokens"][way] for way in WAYS)
        rows.append([*row, f"{behind / whole:.2f}", f"{one['largest difference']:.1e}"])
    cost = "CPU time of a token, behind / whole"
    return format_table([*head, cost, "largest difference, nats"], rows)


def make_turns() -> str:
    made = read("convert_turns")
    passes = made["passes"]
    rows = []
    for title, step in STEPS.items():
        both = [passes[f"{step}, {which}"] for which in ("before", "after")]
        times = [", ".join(f"{one['cpu seconds']:.1f}" for one in found) for found in both]
        peaks = [f"{max(one['memory_gb'] for one in found):.2f}" for found in both]
        least = min(one["cpu seconds"] for one in both[1])
        rows.append([title, *times, f"{made['megabytes of bfloat16'] / least:.0f}", *peaks])
    head = ("conversion", "CPU s, before", "CPU s, after", "MB for a CPU second, after")
    return format_table((*head, "largest memory, GB, before", "GB, after"), rows)


def make_sizes() -> str:
    rows = []
    for layers, one in read("convert").items():
        for title, step in STEPS.items():
            row = [
                title,
                layers.removesuffix(" layers"),
                f"{one['gigabytes']:.1f}",
                f"{one[step]['mb_per_second']:.0f}",
            ]
            row += [f"{one[step]['memory_gb']:.1f}", f"{one['cp']['mb_per_second']:.0f}"]
            rows.append(row)
    head = ("conversion", "layers", "GB of bfloat16", "MB/s of bfloat16", "largest memory, GB")
    return format_table((*head, "`cp`, MB/s"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "Converting 7B parameters": make_sizes,
    "Converting in turns": make_turns,
    "Scoring beside HFLM": make_harness,
    "One checkpoint, native beside HFLM": make_tasks,
    "Questions behind one text": make_prefixes,
}


def find_table(page: str, heading: str) -> tuple[int, int]:
    """Where the first table below a heading begins and ends."""
    found = re.search(rf"^#+ {heading}\n(?:(?!#).*\n)*?((?:\|.*\n)+)", page, re.MULTILINE)
    if not found:
        raise SystemExit(f"{PAGE.name}: no table below the heading {heading}")
    return found.span(1)


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--write", action="store_true")
    args = flags.parse_args()

    page = PAGE.read_text()
    for heading, make in TABLES.items():
        print(f"{heading}\n\n{make()}")
        start, end = find_table(page, heading)
        page = page[:start] + make() + page[end:]
    if args.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
