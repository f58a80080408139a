"""The classification of held-out rows: prompts and labels of a corpus of `prepare --task=classify`.

The learn bits of a row tell its prompt from its label, so no file is read but the corpus.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.data import Classify, Dataset, Tokens, read_options
from gpt_jax.errors import UsageError
from gpt_jax.evals.classification import Measured, measure_classification, tabulate_confusion
from gpt_jax.evals.subject import Subject
from gpt_jax.infer import carry_on, encode_labels, score_labels

CLASSIFY = "classify"
# Rows that are scored together. They are held in memory.
ROWS = 1024


class Labelled(NamedTuple):
    """A source with held-out rows whose labels are known."""

    name: str
    options: Classify
    tokens: Tokens


def find_labelled(data: Dataset) -> list[Labelled]:
    """The sources of `data` that hold out rows of --task=classify."""
    found = []
    for part in data.parts:
        if part.eval is not None and part.task and part.task.task == CLASSIFY:
            options = read_options(CLASSIFY, part.task.options)
            found.append(Labelled(part.name, options, part.eval))
    return found


def check_labelled(evaluators: Sequence[str], data: Dataset, field: str) -> None:
    """Raises UsageError if `classification` is asked of data without labelled held-out rows."""
    if "classification" in evaluators and not find_labelled(data):
        raise UsageError(
            f"{field}: has classification, and the data holds out no labelled rows; prepare them "
            "with --task=classify and --eval_fraction, or leave it out"
        )


def split_row(tokens: Tokens, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(the ids of a row's prompt, those of its label with the end of text)."""
    start = int(tokens.offsets[number])
    stop = int(tokens.offsets[number + 1])
    bits = np.empty(stop - start, np.uint8)
    tokens.read_learn(start, bits)
    ids = tokens.ids(start, stop)
    return ids[bits == 0], ids[bits == 1]


def read_rows(labelled: Labelled, labels: Sequence[np.ndarray], limit: int) -> Iterator[tuple]:
    """(prompts, places of their labels) of at most ROWS rows at a time."""
    places = {label.tobytes(): place for place, label in enumerate(labels)}
    count = labelled.tokens.documents
    for start in range(0, min(count, limit) if limit else count, ROWS):
        stop = min(start + ROWS, limit or count, count)
        rows = [split_row(labelled.tokens, number) for number in range(start, stop)]
        gold = [places[label.astype(np.int32).tobytes()] for _, label in rows]
        yield [prompt for prompt, _ in rows], gold


def classify_heldout(
    subject: Subject,
    labelled: Labelled,
    report: Callable[[str], None],
    tick: Callable[[], None] = carry_on,
    limit: int = 0,
) -> Measured:
    """What the held-out rows of a source tell. A `limit` above 0 takes only so many.

    All processes of a job must call this together.
    """
    labels = encode_labels(subject.tokenizer, labelled.options)
    about = subject.model, subject.compute, subject.params
    gold: list[int] = []
    parts = []
    for prompts, own in read_rows(labelled, labels, limit):
        parts.append(score_labels(*about, prompts, labels, report, tick))
        gold += own
    shares = np.concatenate(parts)
    return measure_classification(
        labelled.options.names, np.array(gold), shares.argmax(1), shares.max(1)
    )


def name_measured(measured: Measured, prefix: str) -> dict[str, float | str]:
    """The numbers and the table of a classification, named for metrics.jsonl."""
    values: dict[str, float | str] = {}
    for name, value in measured.values.items():
        low, high = measured.intervals[name]
        values |= {
            f"eval/{prefix}/{name}": value,
            f"eval/{prefix}/{name}_low": low,
            f"eval/{prefix}/{name}_high": high,
        }
    counts = {"rows": measured.rows, "not_finite": measured.not_finite}
    values |= {f"eval/{prefix}/{name}": float(count) for name, count in counts.items()}
    lines = ["\t".join(row) for row in tabulate_confusion(measured)]
    return values | {f"sample/{prefix}": "\n".join(lines)}
