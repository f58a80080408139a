"""Draws follow the definition of every filter.

They change with seed, sample, prompt and position, and with nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import COMPUTE, LETTERS, knobs_of, make_model, make_params, silent

from gpt_jax.infer.decode import generate
from gpt_jax.infer.sampling import _filter as sampling_filter, sample
from gpt_jax.infer.settings import Sampling


def numpy_filter(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, penalty=1.0, seen=()):
    """The probabilities of one row, by the definitions of transformers' logits processors.

    Those sort, unlike ours.
    """
    x = logits.astype(np.float64).copy()
    for token in seen:
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
    x /= temperature
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    if top_p < 1:
        order = np.argsort(
            x
        )  # ascending; all are dropped that together hold no more than 1 - top_p, but for the best
        drop = np.cumsum(softmax(x)[order]) <= 1 - top_p
        drop[-1] = False
        x[order[drop]] = -np.inf
    p = softmax(x)
    x[p < min_p * p.max()] = -np.inf
    return softmax(x)


FILTERS = [
    {},
    dict(top_k=5),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(top_k=6, top_p=0.8, min_p=0.05),
    dict(temperature=0.5, top_p=0.9),
    dict(penalty=1.8, seen=(0, 3, 7)),
    dict(penalty=0.6, seen=(1, 2), top_k=4),
    dict(top_k=1),
    dict(top_p=0.0),
    dict(top_k=99),
    dict(min_p=1.0),
    dict(temperature=2.0, top_k=9, min_p=0.3),
]


@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_draws_follow_the_definition(setting):
    """Frequencies over 20,000 samples match the distribution, and no filtered token comes."""
    logits = np.random.default_rng(2).standard_normal(12).astype(np.float32) * 2
    rows, vocab = 20_000, 10  # ids 10 and 11 are padding
    expected = numpy_filter(logits[:vocab], **setting)
    penalty, seen_ids = setting.get("penalty", 1.0), setting.get("seen", ())
    values = {k: v for k, v in setting.items() if k not in ("penalty", "seen")}
    knobs = knobs_of(rows, sample=np.arange(rows), repetition_penalty=penalty, **values)
    seen = np.zeros((rows, 12), bool)
    seen[:, list(seen_ids)] = True
    logits = np.broadcast_to(np.where(np.arange(12) < vocab, logits, 50.0), (rows, 12)).astype(
        np.float32
    )
    drawn = np.asarray(
        jax.jit(sample, static_argnums=4)(logits, np.full(rows, 5), knobs, seen, vocab)
    )
    counts = np.bincount(drawn, minlength=12)

    assert counts[vocab:].sum() == 0
    assert ((counts[:vocab] > 0) == (expected > 1e-4)).all()
    np.testing.assert_allclose(counts[:vocab] / rows, expected, atol=4 * 0.5 / rows**0.5)


def test_filters_keep_the_same_ids_as_sorting():
    """They are the same ids over 64 rows of 300, each with settings of its own."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((64, 300)).astype(np.float32) * rng.uniform(
        0.3, 4, (64, 1)
    ).astype(np.float32)
    top_k = rng.choice([0, 1, 7, 40, 299, 500], 64)
    top_p = np.where(rng.random(64) < 0.2, 1, rng.uniform(0, 1, 64))
    scaled = logits - logits.max(-1, keepdims=True)
    kept = np.isfinite(sampling_filter(scaled, knobs_of(64, top_k=top_k, top_p=top_p)))
    for row, x, k, p in zip(kept, scaled, top_k, top_p, strict=True):
        assert (row == (numpy_filter(x, top_k=k, top_p=p) > 0)).all(), (k, p)


def test_rows_with_different_settings_and_greedy():
    logits = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    seen = np.zeros((4, 9), bool)
    knobs = knobs_of(4, temperature=[0.0, 1.0, 0.0, 1.0], top_k=[0, 1, 3, 0], top_p=[1, 1, 1, 0.0])
    drawn = np.asarray(sample(logits, np.arange(4), knobs, seen, 9))
    assert drawn.tolist() == logits.argmax(-1).tolist()

    seen[0, drawn[0]] = True
    strong = sample(
        logits,
        np.arange(4),
        knobs._replace(repetition_penalty=np.full(4, 1e6, np.float32)),
        seen,
        9,
    )
    assert strong[0] != drawn[0] and (np.asarray(strong)[1:] == drawn[1:]).all()


def test_draws_change_with_seed_sample_prompt_and_position_only():
    logits = np.zeros((2, 1000), np.float32)

    def draw(position, **k):
        return np.asarray(
            sample(logits, np.full(2, position), knobs_of(2, **k), np.zeros((2, 1000), bool), 1000)
        ).tolist()

    a, b = draw(3, sample=[0, 1])
    assert a != b and draw(3, sample=[1, 0]) == [b, a]
    assert len({a, draw(4)[0], draw(3, seed=1)[0], draw(3, prompt=1)[0]}) == 4


def test_prompts_of_one_call_have_random_numbers_of_their_own():
    """An untrained model with no preference would continue all of them alike."""
    model = make_model()
    blank = jax.tree.map(jnp.zeros_like, make_params(model))
    given = Sampling(max_new_tokens=12, seed=3)
    done = generate(model, COMPUTE, blank, LETTERS, ["xx", "yy", "zz", "xx"], given, silent)
    texts = [completion.tokens for completion in done]
    assert len(set(texts)) == 3 and texts[0] == texts[3]


def test_extreme_temperatures_stay_finite():
    logits = np.array([[3.0, 1.0, -2.0, 2.9]], np.float32)
    for temperature in (1e-30, 1e-6):
        knobs = knobs_of(1, temperature=temperature, top_p=0.9)
        got = sample(logits, np.zeros(1, int), knobs, np.zeros((1, 4), bool), 4)
        assert got.tolist() == [0]
