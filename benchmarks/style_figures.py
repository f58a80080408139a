"""Figures of how the code is written: sizes, words, packing of lines, arrows between rooms.

    python benchmarks/style_figures.py                         # gpt_jax/
    python benchmarks/style_figures.py gpt_jax PATH [PATH]     # a column for each package
    python benchmarks/style_figures.py --where=long_functions  # the places that a figure counts
    python benchmarks/style_figures.py --record=after          # writes style_figures.json too

The program asserts nothing: a figure shows where to look, and a rule made of it would be met by
worse code. Figures count what stands in the files, so run the formatter first. `style_source.py`
says what each word of the table means.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

from style_source import (
    Prose,
    Source,
    body_lines,
    code_tokens,
    comments,
    count_lines,
    count_words,
    docstrings,
    find_arrows,
    find_rooms,
    functions,
    has_break,
    is_derivable,
    is_named_lambda,
    is_packed_assignment,
    is_tuple_assignment,
    package_name,
    read_package,
    sentence_lengths,
    sentences,
    statements,
)

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".json")

FILE_LINES = 400
FUNCTION_LINES = 50
COLUMNS = 100
LONG_BODY = 12
LONG_SENTENCES = (30, 25)


def spot(source: Source, line: int, note: str = "") -> str:
    """A place as editors and terminals understand it."""
    return f"{source.path}:{line} {note}".rstrip()


def long_sentences(prose: list[Prose], limit: int) -> list[str]:
    """The sentences of more than `limit` words, with the place of the text in which each stands."""
    return [
        spot(each.source, each.line, f"{count_words(sentence)} words: {sentence}")
        for each in prose
        for sentence in sentences(each.text)
        if count_words(sentence) > limit
    ]


def function_places(sources: list[Source]) -> dict[str, list[str]]:
    """Functions that are long, and bodies that nothing divides."""
    every = [(source, function) for source in sources for function in functions(source)]
    bodies = [
        (source, function)
        for source, function in every
        if len(body_lines(source, function)) >= LONG_BODY
    ]

    return {
        "long_functions": [
            spot(source, function.lineno, f"{function.name}, {count_lines(function)} lines")
            for source, function in every
            if count_lines(function) > FUNCTION_LINES
        ],
        "long_bodies": [
            spot(source, function.lineno, function.name) for source, function in bodies
        ],
        "unbroken_bodies": [
            spot(source, function.lineno, function.name)
            for source, function in bodies
            if not has_break(source, function)
        ],
    }


def line_places(sources: list[Source]) -> dict[str, list[str]]:
    """Files that are long, lines that are wide, statements that say several things."""
    nodes = [(source, node) for source in sources for node in statements(source)]
    kinds = {
        "tuple_assignments": is_tuple_assignment,
        "packed_assignments": is_packed_assignment,
        "named_lambdas": is_named_lambda,
    }

    places = {
        name: [spot(source, node.lineno) for source, node in nodes if is_kind(node)]
        for name, is_kind in kinds.items()
    }
    places["long_files"] = [
        spot(source, 1, f"{len(source.lines)} lines")
        for source in sources
        if len(source.lines) > FILE_LINES
    ]
    places["wide_lines"] = [
        spot(source, line, f"{len(source.lines[line - 1])} columns")
        for source in sources
        for line in sorted(code_tokens(source))
        if len(source.lines[line - 1]) > COLUMNS
    ]
    return places


def prose_places(sources: list[Source]) -> dict[str, list[str]]:
    """Sentences that are long, and docstrings that say what a tool can derive."""
    texts = [text for source in sources for text in docstrings(source)]
    prose = texts + [text for source in sources for text in comments(source)]
    derivable = [text for text in texts if is_derivable(text.text)]

    places = {f"sentences_over_{limit}": long_sentences(prose, limit) for limit in LONG_SENTENCES}
    places["derivable_docstrings"] = [spot(text.source, text.line) for text in derivable]
    return places


def find_places(sources: list[Source], package: str) -> dict[str, list[str]]:
    """The places of every figure that counts some, by the figure's name."""
    return {
        **function_places(sources),
        **line_places(sources),
        **prose_places(sources),
        "rooms": sorted(find_rooms(sources)),
        "arrows": [f"{here} -> {there}" for here, there in sorted(find_arrows(sources, package))],
    }


def middle(values: list[int]) -> dict[str, float]:
    """Median and mean; both 0 where nothing was counted."""
    if not values:
        return {"median": 0, "mean": 0}
    return {"median": statistics.median(values), "mean": round(statistics.fmean(values), 2)}


def share(part: int, whole: int) -> float:
    """A part in per cent of a whole, 0 of nothing."""
    return round(100 * part / whole, 1) if whole else 0.0


def rate(count: int, lines: int) -> float:
    """How many there are in a thousand lines, 0 in none."""
    return round(1000 * count / lines, 1) if lines else 0.0


def measure(package: Path) -> dict:
    """All figures of the package in a folder, in the order in which they are printed."""
    sources = read_package(package)
    places = find_places(sources, package_name(package))
    counts = {name: len(found) for name, found in places.items()}
    tokens = [count for source in sources for count in code_tokens(source).values()]
    code = len(tokens)
    words = sentence_lengths([text for source in sources for text in docstrings(source)])
    sizes = [count_lines(function) for source in sources for function in functions(source)]

    return {
        "files": len(sources),
        "lines": sum(len(source.lines) for source in sources),
        "code_lines": code,
        "file_lines": middle([len(source.lines) for source in sources]),
        "long_files": counts["long_files"],
        "functions": len(sizes),
        "function_lines": middle(sizes),
        "long_functions": counts["long_functions"],
        "docstring_sentences": len(words),
        "words_a_docstring_sentence": middle(words),
        **{
            f"sentences_over_{limit}": counts[f"sentences_over_{limit}"] for limit in LONG_SENTENCES
        },
        "derivable_docstrings": counts["derivable_docstrings"],
        "long_bodies": counts["long_bodies"],
        "unbroken_bodies": counts["unbroken_bodies"],
        "unbroken_bodies_percent": share(counts["unbroken_bodies"], counts["long_bodies"]),
        "tokens_a_code_line": middle(tokens),
        "wide_lines_percent": share(counts["wide_lines"], code),
        "tuple_assignments": counts["tuple_assignments"],
        "tuple_assignments_per_thousand": rate(counts["tuple_assignments"], code),
        "packed_assignments": counts["packed_assignments"],
        "packed_assignments_per_thousand": rate(counts["packed_assignments"], code),
        "named_lambdas": counts["named_lambdas"],
        "rooms": counts["rooms"],
        "arrows": counts["arrows"],
    }


# ---- what is printed ----

MEANINGS = {
    "files": "files",
    "lines": "lines",
    "code_lines": "code lines",
    "file_lines": "lines a file, median / mean",
    "long_files": f"files over {FILE_LINES} lines",
    "functions": "functions",
    "function_lines": "lines a function, median / mean",
    "long_functions": f"functions over {FUNCTION_LINES} lines",
    "docstring_sentences": "sentences in docstrings",
    "words_a_docstring_sentence": "words a docstring sentence, median / mean",
    "sentences_over_30": "sentences over 30 words, comments too",
    "sentences_over_25": "sentences over 25 words, comments too",
    "derivable_docstrings": 'docstrings with "(called by" or "(floor"',
    "long_bodies": f"function bodies of {LONG_BODY} or more lines",
    "unbroken_bodies": "  of them without a blank line or comment",
    "unbroken_bodies_percent": "  of them, in per cent",
    "tokens_a_code_line": "tokens a code line, median / mean",
    "wide_lines_percent": f"code lines over {COLUMNS} columns, per cent",
    "tuple_assignments": "tuple assignments",
    "tuple_assignments_per_thousand": "  in a thousand code lines",
    "packed_assignments": "tuple assignments of unrelated values",
    "packed_assignments_per_thousand": "  in a thousand code lines",
    "named_lambdas": "lambdas with a name",
    "rooms": "rooms",
    "arrows": "arrows between rooms",
}


def show(value: float | dict[str, float]) -> str:
    """A figure for people: `11 / 11.94` for median and mean."""
    if isinstance(value, dict):
        return " / ".join(f"{part:,g}" for part in value.values())
    return f"{value:,g}"


def make_table(names: list[str], columns: list[dict]) -> str:
    """Figures side by side, a column for each package."""
    rows = [["", *names]]
    for key, meaning in MEANINGS.items():
        rows.append([meaning, *(show(figures[key]) for figures in columns)])

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for meaning, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([meaning.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def read_commit(folder: Path) -> str:
    """The commit that is checked out around a folder, with `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def record(label: str, package: Path, figures: dict) -> None:
    """Writes the figures of a package under `label`; what stands under other labels stays."""
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    kept[label] = {
        "commit": read_commit(package),
        "package": package_name(package),
        "figures": figures,
    }
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def make_flags() -> argparse.ArgumentParser:
    """The flags of this program."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("packages", nargs="*", type=Path, default=[ROOT / "gpt_jax"])
    flags.add_argument("--where", metavar="FIGURE", help="print the places that a figure counts")
    flags.add_argument(
        "--record",
        choices=("before", "after"),
        help="also write the figures of the first package to style_figures.json",
    )
    return flags


def main() -> None:
    """Prints a table, or places."""
    flags = make_flags()
    args = flags.parse_args()
    packages = [path.resolve() for path in args.packages]
    for package in packages:
        if not package.is_dir():
            flags.error(f"{package} is no folder")

    if args.where:
        for package in packages:
            places = find_places(read_package(package), package_name(package))
            if args.where not in places:
                flags.error(f"--where={args.where}: choose from {', '.join(places)}")
            print("\n".join(places[args.where]))
        return

    columns = [measure(package) for package in packages]
    print(make_table([package_name(package) for package in packages], columns))
    if args.record:
        record(args.record, packages[0], columns[0])


if __name__ == "__main__":
    main()
