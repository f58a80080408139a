"""Classification by likelihood: which of a few labels a model holds likeliest after a prompt."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.data import Classify, Tokenizer
from gpt_jax.infer.requests import Ids, Request
from gpt_jax.infer.score import carry_on, score_requests


class Classified(NamedTuple):
    """The likeliest label of a text, and the probability of each label among all of them."""

    label: str
    probabilities: dict[str, float]


def encode_labels(tokenizer: Tokenizer, options: Classify) -> list[np.ndarray]:
    """The ids of the words of each label, as training had them: with the end of text after them.

    So the words of one label may begin another's.
    """
    end = [] if tokenizer.eot is None else [tokenizer.eot]
    return [np.append(ids, end).astype(np.int32) for ids in tokenizer.encode_batch(options.words)]


def score_labels(
    model: config.Model,
    compute: config.Compute,
    params,
    prompts: Sequence[Ids],
    labels: Sequence[Ids],
    report: Callable[[str], None],
    tick: Callable[[], None] = carry_on,
) -> np.ndarray:
    """The probability of each label after each prompt, among the labels: float64 [N, L].

    Prompts and labels are ids. Arguments, and what it raises, are those of `score_requests`. A row
    is NaN if the model's scores are.
    """
    requests = [Request(prompt, label) for prompt in prompts for label in labels]
    scores = score_requests(model, compute, params, requests, report, tick)
    totals = np.array([score.total for score in scores]).reshape(len(prompts), len(labels))
    weights = np.exp(totals - totals.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def classify_prompts(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: Classify,
    report: Callable[[str], None],
) -> list[Classified]:
    """The label of each prompt, which is a text.

    A prompt is tokenized apart from its label, as in training, and comes after the tokenizer's
    `begin`, if it has one. Other arguments, and what it raises, are those of `score_requests`.
    """
    labels = encode_labels(tokenizer, options)
    before = [] if tokenizer.begin is None else [tokenizer.begin]
    ids = [np.append(before, own).astype(np.int32) for own in tokenizer.encode_batch(prompts)]
    shares = score_labels(model, compute, params, ids, labels, report)
    return [
        Classified(
            options.names[int(own.argmax())],
            dict(zip(options.names, map(float, own), strict=True)),
        )
        for own in shares
    ]
