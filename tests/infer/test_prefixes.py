"""Requests behind a text that is read once have the scores that they have alone."""

import jax
import numpy as np
import pytest
from test_score import EXPERTS, MODERN, make_model, make_params, run
from test_score_rows import SHARED, fit

from gpt_jax import config
from gpt_jax.infer import prefixes, score
from gpt_jax.infer.prefixes import choose_prefixes, count_behind, make_groups
from gpt_jax.infer.requests import Request
from gpt_jax.infer.score import score_requests
from gpt_jax.infer.score_rows import group_by_context
from gpt_jax.model.transformer import abstract_params
from gpt_jax.sharding.mesh import make_concrete


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(prefixes, "TOKENS", 32)


def draw(model, sizes=(20, 24), questions=4) -> list[Request]:
    """Questions behind each of some texts, in turn. They have one, two or three continuations."""
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, model.vocab, size) for size in sizes]
    requests = []
    for number in range(questions):
        for text in texts:
            context = np.concatenate([text, rng.integers(0, model.vocab, 3 + number)])
            for count in range(1, 2 + number % 3):
                requests.append(Request(context, rng.integers(0, model.vocab, count)))
    # A context that nobody shares, and one that is too long.
    alone = [(9, 3), (60, 2)]
    return requests + [Request(*(rng.integers(0, model.vocab, n) for n in one)) for one in alone]


def list_prefixes(model, requests, multiple=1) -> list[tuple[int, int]]:
    """(size of the text, requests) of each group."""
    groups = make_groups(fit(model, requests), model, multiple, True)
    return [(len(group.prefix), sum(len(row.numbers) for row in group.rows)) for group in groups]


@pytest.mark.parametrize(
    "changes, compute",
    [
        ({}, {}),
        (SHARED, {}),
        (EXPERTS | {"position": "rotary"}, {}),
        ({"position": "sinusoidal", "attention_softcap": 5.0}, {"kernel": "blocked"}),
    ],
    ids=["learned", "modern", "experts", "softcap"],
)
def test_behind_a_text_as_alone(changes, compute):
    model = make_model(**changes)
    settings = config.Compute(**{"kernel": "reference"} | compute)
    requests = draw(model)
    assert list_prefixes(model, requests) == [(0, 2), (24, 7), (20, 7)]

    together = run(model, requests, settings, list)
    apart = score_rows_whole(model, settings, requests)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert one.is_greedy == other.is_greedy and one.cut == other.cut


def score_rows_whole(model, compute, requests):
    """Scores without texts that are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "choose_prefixes", lambda fitted, contexts, *_: whole(contexts))
        return run(model, requests, compute, list)


def whole(contexts) -> prefixes.Cover:
    return prefixes.Cover(0, [], contexts)


@pytest.mark.parametrize(
    "shape, is_read_once",
    [
        (dict(data=2, fsdp=2), True),
        (dict(fsdp=2, tensor=2), True),
        (dict(data=2, context=2), True),
        (dict(data=2, pipeline=2), False),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(mesh, shape, is_read_once, monkeypatch):
    """Each part of the mesh reads the text. A pipeline reads whole rows."""
    model = make_model(**SHARED | {"layers": 2, "value_embed": False})
    requests = draw(model)
    monkeypatch.setattr(prefixes, "TOKENS", 16)
    monkeypatch.setattr(prefixes, "DEARER", 0.5)  # four parts would need more questions
    plain = score_rows_whole(model, config.Compute(kernel="reference"), requests)

    texts = []
    read_text = score._read_text
    monkeypatch.setattr(
        score, "_read_text", lambda *args, **kwargs: texts.append(0) or read_text(*args, **kwargs)
    )
    devices = mesh(**shape)
    with jax.set_mesh(devices):
        like = make_concrete(abstract_params(model), devices)
        placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), make_params(model), like)
        compute = config.Compute(kernel="reference")
        found = score_requests(model, compute, placed, requests, list)
    assert bool(texts) == is_read_once
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def test_bfloat16_is_near():
    model = make_model(**SHARED)
    compute = config.Compute(kernel="reference", dtype="bfloat16")
    requests = draw(model)
    apart = score_rows_whole(model, compute, requests)
    for one, other in zip(run(model, requests, compute, list), apart, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=0.1)


def test_one_compilation_for_a_bucket():
    """Other texts of other lengths, and other numbers of questions, are no other programs."""
    model = make_model(mlp=40)
    run(model, draw(model, sizes=(20, 24)), report=list)
    before = score._score._cache_size(), score._read_text._cache_size()
    run(model, draw(model, sizes=(21, 23, 27, 18), questions=7), report=list)
    assert (score._score._cache_size(), score._read_text._cache_size()) == before


def test_texts_that_do_not_pay_are_read_in_rows():
    model = make_model()
    # Half of a row of 16 would be saved, which is none of its padded tokens.
    assert list_prefixes(model, draw(model, (8,), 8)[:-2]) == [(0, 15)]
    # One question alone shares its text with nobody.
    assert list_prefixes(model, draw(model, (24,), 1)[:-2]) == [(0, 1)]
    # Sixteen parts would each read the text, and have too few rows.
    assert list_prefixes(model, draw(model, (24,), 6)[:-2], 16) == [(0, 12)]
    # What looks at the places of a row cannot be behind a text.
    moved = make_model(**MODERN)
    assert {size for size, _ in list_prefixes(moved, draw(moved))} == {0}


def test_the_longest_common_text_that_pays_is_taken():
    """All texts begin alike, and two of them have more in common."""
    model = make_model(max_seq=128)
    rng = np.random.default_rng(3)
    start, more = rng.integers(0, 40, 16), rng.integers(0, 40, 64)

    def ask(text, questions):
        ends = rng.integers(0, 40, (questions, 4))
        return [Request(np.concatenate([text, end]), [1]) for end in ends]

    long = np.concatenate([start, more])
    assert list_prefixes(model, ask(long, 8)) == [(80, 8)]
    both = ask(long, 8) + ask(start, 8)
    assert sorted(list_prefixes(model, both)) == [(0, 8), (80, 8)]


def test_tokens_behind_a_text_are_counted():
    """By hand: 3 rows of 16 are two batches of two rows, and 1 row of 32 is a batch of one."""
    assert count_behind(20, [16, 16, 32, 16], 48, multiple=1) == 32 + 4 * 16 + 32
    # Each of two parts reads the text. A batch has four rows of 16, or two of 32.
    assert count_behind(20, [16, 16, 32, 16], 48, multiple=2) == 2 * 32 + 4 * 16 + 2 * 32


def test_the_context_keeps_a_token():
    """The first target comes after the last token of the context, so the row reads that one."""
    model = make_model()
    text = np.arange(20)
    requests = [Request(text, [n]) for n in range(3)] + [Request(np.append(text, 9), [1])] * 2
    contexts = group_by_context(fit(model, requests), model)
    assert [len(one) for one in contexts] == [3, 2]
    cover = choose_prefixes(fit(model, requests), contexts, 48, 1)
    assert all(size < 20 for size, _ in cover.shared)
    assert prefixes.count_common(text, np.append(text, 9)) == 19
    assert prefixes.count_common(text[:1], text) == 0
