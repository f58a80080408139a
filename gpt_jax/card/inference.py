"""Checks of what a trained model is asked: it decodes as it trains, and scores each sample plainly.

Shapes: B rows, T tokens, V rows of the embedding.
"""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config as configs
from gpt_jax.card.finding import CannotCheckError, Result, find_worst
from gpt_jax.card.subject import Subject, load_weights, take_ids
from gpt_jax.evals import Subject as Asked, TaskSettings, run_tasks
from gpt_jax.infer import (
    Request,
    Sampling,
    compute_logits,
    encode_pairs,
    generate,
    score_requests,
    start_token,
)
from gpt_jax.model import Transformer, make_cache

# A part of the largest logit, and of a log-probability in nats. Both sides are float32.
TOLERANCE = 1e-4
ROWS = 2
PROMPT = 8
# Texts of the local task: contexts that end in a space or are empty, and several tokens to choose.
QUESTIONS = (
    {"q": "ab cd ", "choices": ["ef", "gh ab", "c"], "gold": 0},
    {"q": "", "choices": ["ab", "hg"], "gold": 1},
    {"q": "ab cd ef gh ab cd ef gh ab cd ef gh ab cd ef gh ab cd ef gh", "choices": ["a", "bc"]},
)
TASK = "card_choice"


def prepare(subject: Subject) -> tuple[configs.Model, configs.Compute]:
    """The subject's model as it infers: without dropout and capacities, by the plain kernel."""
    config = subject.config
    model, compute = configs.for_inference(config.model, config.compute)
    return replace(model, dispatch="dropless"), replace(compute, kernel="reference")


def check_decoding(subject: Subject) -> Result:
    """Logits out of the KV cache are those of the whole text, and greedy text follows them."""
    params = load_weights(subject)
    model, compute = prepare(subject)
    ids = take_ids(subject, ROWS)
    network = Transformer(model, compute)
    with jax.set_mesh(subject.parts.mesh):
        whole = np.asarray(jax.jit(network.apply)({"params": params}, {"tokens": ids}))
        stepped = decode_logits(network, params, ids)
    error = float(np.abs(stepped - whole[:, PROMPT - 1 :]).max() / np.abs(whole).max())

    agreeing, count = compare_greedy(subject, model, compute, params, ids[0, :PROMPT])
    return Result(
        error <= TOLERANCE and agreeing == count,
        f"logits differ by {error:.1e} of the largest; {agreeing} of {count} greedy tokens are "
        "the most likely ones of the whole text",
    )


def decode_logits(network: Transformer, params: Any, ids: np.ndarray) -> np.ndarray:
    """The logits [B, T - PROMPT + 1, V] after a prompt, and after each further token."""
    rows, length = ids.shape
    cache = make_cache(network.model, network.compute, rows, length)

    def step(params, cache, batch, lengths):
        variables = {"params": params}
        hidden, cache = network.apply(variables, batch, cache, lengths, method="step")
        return network.apply(variables, hidden[:, -1:], method="unembed"), cache

    prompt = {"tokens": jnp.asarray(ids[:, :PROMPT]), "segment": jnp.ones((rows, PROMPT), int)}
    logits, cache = jax.jit(step)(params, cache, prompt, jnp.full(rows, PROMPT))
    parts = [logits]
    follow = jax.jit(step)
    for place in range(PROMPT, length):
        position = jnp.full((rows, 1), place)
        batch = {"tokens": jnp.asarray(ids[:, place : place + 1]), "position": position}
        logits, cache = follow(params, cache, batch, jnp.full(rows, place))
        parts.append(logits)
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


def compare_greedy(subject: Subject, model, compute, params, prompt) -> tuple[int, int]:
    """(greedy tokens that the whole text agrees with, greedy tokens)."""
    tokenizer = subject.parts.data.tokenizer
    sampling = Sampling(max_new_tokens=model.max_seq - PROMPT, temperature=0.0)
    with jax.set_mesh(subject.parts.mesh):
        given = (model, compute, params)
        [done] = generate(*given, tokenizer, [prompt], sampling, subject.say)
        ids = np.array([*prompt, *done.tokens])
        logits = compute_logits(*given, ids, subject.say)[:, : tokenizer.vocab]

    # Two programs round differently, so a token that ties with the best one counts too.
    best = logits.max(-1)
    after = range(PROMPT - 1, len(ids) - 1)
    close = TOLERANCE * float(np.abs(logits).max())
    agreeing = sum(logits[place, ids[place + 1]] >= best[place] - close for place in after)
    return int(agreeing), len(after)


def check_scores(subject: Subject) -> Result:
    """Scores of continuations in shared rows are plain sums of log-probabilities."""
    params = load_weights(subject)
    model, compute = prepare(subject)
    ids = take_ids(subject, ROWS)
    start = start_token(subject.parts.data.tokenizer)
    requests = [
        Request(ids[0, :6], ids[0, 6:9]),
        Request(ids[0, :6], ids[1, 3:8]),
        Request([start], ids[1, :12]),
        Request(np.tile(ids[1], 1 + model.max_seq // ids.shape[1]), ids[0, :4]),
    ]
    with jax.set_mesh(subject.parts.mesh):
        given = (model, compute, params)
        scores = score_requests(*given, requests, subject.say)
        sums = [add_up(*given, request, subject.say) for request in requests]
    pairs = zip(scores, sums, strict=True)
    errors = [abs(score.total - total) for score, (total, _) in pairs]
    greedy = [score.is_greedy == is_best for score, (_, is_best) in zip(scores, sums, strict=True)]
    largest = find_worst(errors)
    return Result(
        largest <= TOLERANCE * max(1.0, max(abs(total) for total, _ in sums)) and all(greedy),
        f"{len(requests)} continuations, largest difference {largest:.1e} nats; "
        f"{sum(greedy)} of {len(greedy)} agree on what is greedy",
    )


def add_up(model, compute, params, request: Request, say) -> tuple[float, bool]:
    """(the sum of a continuation's log-probabilities, whether each token is the most likely).

    The text is cut to the context by the harness's rule, and read by itself.
    """
    count = len(request.continuation)
    whole = np.concatenate([np.asarray(part, np.int64) for part in request])
    whole = whole[-(model.max_seq + 1) :]
    logits = compute_logits(model, compute, params, whole[:-1], say)[-count:].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = whole[-count:]
    total = logprobs[np.arange(count), targets].sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


def check_harness(subject: Subject) -> Result:
    """Each sample that lm-evaluation-harness asks gets the plain sum for its answer."""
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports] an extra
    except ModuleNotFoundError:
        raise CannotCheckError("lm_eval is not installed: pip install 'gpt_jax[eval]'") from None

    params = load_weights(subject)
    model, compute = prepare(subject)
    tokenizer = subject.parts.data.tokenizer
    settings = TaskSettings([TASK], folder=write_task(subject), log_samples=True)
    errors = []
    with jax.set_mesh(subject.parts.mesh):
        results = run_tasks(Asked(model, compute, params, tokenizer), settings, subject.say)
        for texts, answer in list_answers(results["samples"][TASK]):
            [request] = encode_pairs(tokenizer, [texts])
            total, is_greedy = add_up(model, compute, params, request, subject.say)
            errors.append(abs(answer[0] - total) if answer[1] == is_greedy else np.inf)
    largest = find_worst(errors)
    return Result(
        largest <= TOLERANCE * 100,
        f"{len(errors)} answers of {len(QUESTIONS)} samples, largest difference {largest:.1e} nats",
    )


def list_answers(samples: list[dict]) -> list[tuple[tuple[str, str], tuple[float, bool]]]:
    """((context, continuation), (log-probability, is it greedy)) of each request of a task."""
    answers = []
    for sample in samples:
        arguments = sample["arguments"]
        asked = arguments.values() if isinstance(arguments, dict) else arguments
        for given, response in zip(asked, sample["resps"], strict=True):
            texts = tuple(given.values()) if isinstance(given, dict) else tuple(given)
            total, is_greedy = response[0]
            answers.append((texts[:2], (float(total), str(is_greedy) == "True")))
    return answers


def write_task(subject: Subject) -> str:
    """Writes a task of multiple choice with its rows, and returns its folder."""
    folder = subject.folder / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    lines = [json.dumps({"gold": 0, **question}) + "\n" for question in QUESTIONS]
    rows.write_text("".join(lines))
    # YAML reads JSON. The cache lies here too, so that nothing of a card stays behind.
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))
    return str(folder)
