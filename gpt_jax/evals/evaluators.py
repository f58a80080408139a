"""What is measured at an evaluation: a table of functions, asked for by `config.eval.evaluators`.

An evaluator is a function `(Evaluation) -> {name: value}`. Numbers are named `eval/…`, and texts
`sample/…`. All processes of a job call it together, and process 0 writes what it gives.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from gpt_jax import config
from gpt_jax.data import Dataset
from gpt_jax.evals.classified import classify_heldout, find_labelled, name_measured
from gpt_jax.evals.heldout import (
    average_by_source,
    compute_heldout_metrics,
    measure_xz_bits_per_byte,
    name_by_text,
)
from gpt_jax.evals.questions import measure_questions
from gpt_jax.evals.samples import draw_samples
from gpt_jax.evals.subject import Subject
from gpt_jax.infer import carry_on
from gpt_jax.metrics import Sums


class Evaluation(NamedTuple):
    """What an evaluator may look at."""

    model: config.Model
    compute: config.Compute
    knobs: config.Eval
    seed: int  # of the run
    params: Any  # averaged weights where the run keeps them
    data: Dataset
    step: int
    # {source: Sums of the objective over its held-out batches}. Each call goes over them anew.
    sum_heldout: Callable[[], dict[str, Sums]]
    shares: Mapping[str, float]  # {source: its part of the rows}
    # The same of config.eval.sets, {set: Sums}.
    sum_sets: Callable[[], dict[str, Sums]] = dict
    # An evaluator that takes long calls this now and then. It may raise, to end the evaluation.
    tick: Callable[[], None] = carry_on


def measure_heldout(evaluation: Evaluation) -> dict[str, float]:
    """`eval/loss` and the like, see `average_by_source`, and `eval/<set>/loss` of further sets.

    It gives {} if nothing is held out and there are no sets.
    """
    metrics = {
        source: compute_heldout_metrics(own) for source, own in evaluation.sum_heldout().items()
    }
    averaged = average_by_source(metrics, evaluation.shares) if metrics else {}
    by_set = {name: compute_heldout_metrics(own) for name, own in evaluation.sum_sets().items()}
    return averaged | name_by_text(by_set)


def measure_xz(evaluation: Evaluation) -> dict[str, float]:
    """`eval/xz_bits_per_byte` of the held-out text, a line to compare the model's with."""
    if not evaluation.data.heldout or jax.process_index():
        return {}
    return {"eval/xz_bits_per_byte": measure_xz_bits_per_byte(evaluation.data)}


def write_sample(evaluation: Evaluation) -> dict[str, str]:
    """`sample/0`: a text that the model writes."""
    texts = draw_samples(
        evaluation.model,
        evaluation.compute,
        evaluation.params,
        evaluation.data.tokenizer,
        evaluation.knobs,
        (evaluation.seed + evaluation.step) % 2**32,
        1,
    )
    return {"sample/0": texts[0]}


def answer_questions(evaluation: Evaluation) -> dict[str, float]:
    """`eval/<file>/acc` and the like, see `measure_questions`."""
    subject = Subject(
        evaluation.model, evaluation.compute, evaluation.params, evaluation.data.tokenizer
    )
    # What was cut, left out or not finite is counted in the metrics.
    return measure_questions(
        subject, evaluation.knobs.questions, lambda line: None, evaluation.tick
    )


def classify_rows(evaluation: Evaluation) -> dict[str, float | str]:
    """`eval/classification/accuracy` and the like, of held-out rows of prepare --task=classify.

    Each has its bounds beside it, as `_low` and `_high`. The counts by label are a text,
    `sample/classification`. Of several sources, each has its name after `classification`.
    """
    subject = Subject(
        evaluation.model, evaluation.compute, evaluation.params, evaluation.data.tokenizer
    )
    sources = find_labelled(evaluation.data)
    limit = evaluation.knobs.batches * evaluation.knobs.batch_size
    values: dict[str, float | str] = {}
    for source in sources:
        measured = classify_heldout(subject, source, lambda line: None, evaluation.tick, limit)
        name = f"classification/{source.name}" if len(sources) > 1 else "classification"
        values |= name_measured(measured, name)
    return values


EVALUATORS: dict[str, Callable[[Evaluation], Mapping[str, float | str]]] = {
    "heldout": measure_heldout,
    "samples": write_sample,
    "xz": measure_xz,
    "questions": answer_questions,
    "classification": classify_rows,
}


def run_evaluators(evaluation: Evaluation) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, texts) of the evaluators that `evaluation.knobs` asks for, in that order."""
    values: dict[str, float | str] = {}
    for name in evaluation.knobs.evaluators:
        values |= EVALUATORS[name](evaluation)
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    numbers = {name: float(value) for name, value in values.items() if name not in texts}
    return numbers, texts
