"""`gpt-jax classify --file`: a file row by row, in bounded memory, that can be continued."""

import argparse
import csv
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.commands.evaluate_results import check_place, save
from gpt_jax.commands.evaluate_tasks import align, without_nan
from gpt_jax.commands.output import emit, write_json
from gpt_jax.errors import UsageError, escape
from gpt_jax.files import describe_error, is_there, replace_file

Say = Callable[[str], None]
# Rows that are classified together, and written before the next ones are read.
ROWS = 256


def check_file_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together, and for places that cannot be."""
    needs = (("out", "file"), ("label", "file"), ("label", "out"), ("page", "label"))
    for flag, other in needs:
        if getattr(args, flag) and not getattr(args, other):
            raise UsageError(f"--{flag}={getattr(args, flag)}: needs --{other}")
    if args.on_error not in ("stop", "skip"):
        raise UsageError(f"--on_error={args.on_error}: choose one of stop, skip")
    if args.file and "://" not in args.file and not is_there(args.file):
        raise UsageError(f"--file={args.file}: no such file")
    if args.out and Path(args.out).suffix not in WRITERS:
        raise UsageError(f"--out={args.out}: expected a name that ends in .jsonl or .csv")
    check_place("--out", args.out)
    check_place("--page", args.page)


# ---- lines of the output ----


def format_row(row: dict[str, Any]) -> str:
    """A row as JSON, which has no NaN: a probability that is none becomes null."""
    return write_json(row | {"probabilities": without_nan(row["probabilities"])})


def write_json_line(row: dict[str, Any]) -> str:
    return format_row(row) + "\n"


def write_csv_line(row: dict[str, Any]) -> str:
    """A line of the table. Each label has a column of its probability."""
    gold = [row["gold"]] if "gold" in row else []
    return join_cells([row["row"], row["label"], *row["probabilities"].values(), *gold])


def join_cells(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def write_csv_header(names: Sequence[str], has_gold: bool) -> str:
    gold = ["gold"] if has_gold else []
    return join_cells(["row", "label", *(f"p({name})" for name in names), *gold])


WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    ".jsonl": write_json_line,
    ".csv": write_csv_line,
}


def read_jsonl(path: Path, names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            share = row["probabilities"][row["label"]]
            yield row["gold"], row["label"], math.nan if share is None else share


def read_csv(path: Path, names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["gold"], row["label"], float(row[f"p({row['label']})"])


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[tuple[str, str, float]]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
}


# ---- a file that was begun ----


def locate_state(out: Path) -> Path:
    """The file that says what an unfinished output is made of. It is removed at the end."""
    return out.with_name(f".{out.name}.begun.json")


def begin_output(out: Path, about: dict[str, Any], header: str) -> int:
    """Makes the output ready, and gives the rows that an earlier call has finished.

    Raises UsageError for a file that is finished, or that was begun with other arguments.
    """
    state = locate_state(out)
    if out.exists() and not state.exists():
        raise UsageError(f"--out={out}: is there already; remove it, or name another file")
    if out.exists():
        done = keep_whole_lines(out) - bool(header)
        is_same = state.read_bytes() == json.dumps(about).encode()
        if done > 0 and not is_same:
            raise UsageError(
                f"--out={out}: was begun with another checkpoint, file or options; give the same "
                "ones, or remove it"
            )
        # A call that failed before its first row may be mended: it left nothing to lose.
        if done >= 0 and is_same:
            return done
    replace_file(state, json.dumps(about).encode())
    out.write_text(header, encoding="utf-8")
    return 0


def keep_whole_lines(path: Path) -> int:
    """Cuts off a last line that has no end, and counts the others."""
    count = 0
    size = 0
    with open(path, "rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                count += 1
                size += len(line)
        file.truncate(size)
    return count


# ---- the work ----


def classify_file(args: argparse.Namespace, loaded, given, say: Say) -> None:
    """Writes or prints the label of each row. Raises UsageError for what cannot be used."""
    from gpt_jax.data import Reading, Tally, find_sources, read_documents, whole_piece

    options = loaded.find_classification(given)
    if any("\n" in name for name in options.names):
        raise UsageError("--task_options labels: a label holds an end of line; rename it")
    pairs = (
        ("prompt", options.prompt),
        ("labels", json.dumps(dict(options.labels))),
        ("label", args.label),
    )
    reading = Reading(task="classify", task_options=pairs, on_error=args.on_error)
    sources = find_sources((args.file,), "--file")
    source, *others = sources
    if others:
        raise UsageError(f"--file={args.file}: holds {len(sources)} files; name one")

    tally = Tally()
    documents = read_documents([whole_piece(source)], reading, tally)
    if args.out:
        # Without --out it is standard output that fails, and `emit` tells of that.
        try:
            write_rows(args, loaded, options, documents, say)
        except OSError as error:
            raise UsageError(
                f"--out={args.out}: {describe_error(error)}; what is written stays: the same "
                "command goes on from there"
            ) from None
    else:
        for row in label_documents(loaded, options, documents, bool(args.label), say):
            emit(format_row(row))
    for line in tally.notes(reading):
        say(line)
    if args.label:
        report(args, loaded, options)


def write_rows(args: argparse.Namespace, loaded, options, documents, say: Say) -> None:
    """Writes the rows that the output lacks."""
    out = Path(args.out)
    stat = os.stat(args.file) if is_there(args.file) else None
    about = {
        "checkpoint": str(loaded.directory),
        "step": loaded.step,
        "file": [args.file, stat and [stat.st_size, stat.st_mtime_ns]],
        "options": [options.prompt, options.labels, args.label, args.on_error],
    }
    is_csv = out.suffix == ".csv"
    header = write_csv_header(options.names, bool(args.label)) if is_csv else ""
    done = begin_output(out, about, header)
    if done:
        say(f"--out={out}: {done:,} rows are there already, and it goes on after them")

    rest = itertools.islice(documents, done, None)
    write = WRITERS[out.suffix]
    with open(out, "a", encoding="utf-8") as file:
        for row in label_documents(loaded, options, rest, bool(args.label), say):
            file.write(write(row))
    locate_state(out).unlink()


def label_documents(
    loaded, options, documents, has_gold: bool, say: Say
) -> Iterator[dict[str, Any]]:
    """A row of output for each document, in their order. ROWS of them are in memory."""
    names = {words: name for name, words in options.labels}
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, ROWS)):
        examples = [document.example.spans for document in chunk]
        found = loaded.classify_prompts([spans[0].text for spans in examples], options, say)
        for document, spans, one in zip(chunk, examples, found, strict=True):
            gold = {"gold": names[spans[1].text]} if has_gold else {}
            yield {"row": document.row + 1, **one._asdict(), **gold}


def report(args: argparse.Namespace, loaded, options) -> None:
    """Prints what the finished output is worth, and writes the page."""
    from gpt_jax.evals import make_classification_page, measure_classification, tabulate_confusion

    out = Path(args.out)
    places = {name: place for place, name in enumerate(options.names)}
    rows = [
        (places[gold], places[label], share)
        for gold, label, share in READERS[out.suffix](out, options.names)
    ]
    if not rows:
        raise UsageError(f"--file={args.file}: holds no rows, so nothing can be measured")
    gold, chosen, confidence = (np.array(column) for column in zip(*rows, strict=True))
    measured = measure_classification(options.names, gold, chosen, confidence)

    if args.json:
        emit(write_json(measured.to_json(), 2))
    else:
        lines = [f"rows: {measured.rows:,}; not finite: {measured.not_finite:,}"]
        for name, value in measured.values.items():
            low, high = measured.intervals[name]
            lines.append(f"{name}: {value:.4f} ({low:.4f} to {high:.4f})")
        lines += align(tabulate_confusion(measured))
        emit("\n".join(map(escape, lines)))
    if args.page:
        subtitle = f"{loaded.directory}, step {loaded.step}, {args.file}"
        save("--page", args.page, make_classification_page(measured, "Classification", subtitle))
