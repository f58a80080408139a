"""Scores equal the log-softmax of a plain forward pass, in any batch and on any mesh."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer, make_char_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.infer import requests, score, score_batches
from gpt_jax.infer.prefixes import make_groups
from gpt_jax.infer.requests import Request, encode_pairs, fit_request, make_rolling_requests
from gpt_jax.infer.score import compute_logits, score_requests
from gpt_jax.infer.score_batches import make_batches
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.sharding.mesh import make_concrete

BASE = dict(layers=2, embed=16, heads=4, mlp=32, vocab=40, max_seq=48)
MODERN = dict(
    layers=3,
    position="rotary",
    kv_heads=2,
    tied=False,
    windows=(5, 0),
    value_embed=True,
    value_embed_gate=8,
    smear=True,
    smear_gate=5,
    backout=True,
    logit_softcap=15.0,
)
EXPERTS = dict(pattern=(("attention", "moe"),), experts=4, expert_mlp=16, capacity_factor=0.25)
COMPUTE = config.Compute(kernel="reference")
# (ids of the context, ids of the continuation) by their sizes, over three buckets
SIZES = ((1, 1), (3, 2), (30, 9), (1, 40), (44, 4), (9, 1), (16, 1), (15, 17), (2, 3))


def make_model(**changes) -> config.Model:
    model = config.from_dict({**BASE, **changes}, config.Model)
    return config.resolve(config.Config(model=model)).model


@cache
def make_params(model: config.Model):
    """Parameters of noise, large enough that no most likely token is an accident of rounding."""
    rng = np.random.default_rng(1)

    def one(leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(one, abstract_params(model))


def draw_requests(model, sizes=SIZES) -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(rng.integers(0, model.vocab, a), rng.integers(0, model.vocab, b)) for a, b in sizes
    ]


def silent(line: str) -> None:
    raise AssertionError(f"nothing to report, got {line!r}")


def run(model, asked, compute=COMPUTE, report=silent):
    return score_requests(model, compute, make_params(model), asked, report)


@partial(jax.jit, static_argnums=(0, 1))
def forward(model, compute, params, tokens):
    return Transformer(model, compute).apply({"params": params}, {"tokens": tokens})


def read_off(model, request, compute=COMPUTE):
    """(log-probabilities of the continuation, is it greedy) by one plain pass, padded on the right.

    What lies to the right of a token cannot change it.
    """
    ids = np.concatenate(request)[-(model.max_seq + 1) :]
    tokens = np.zeros((1, model.max_seq), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(forward(model, compute, make_params(model), tokens))[0, : len(ids) - 1]
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    count = len(request.continuation)
    is_greedy = (logits[-count:].argmax(-1) == ids[-count:]).all()
    return logprobs[-count:], is_greedy


@pytest.mark.parametrize("changes", [{}, MODERN, EXPERTS | {"position": "rotary"}])
def test_scores_equal_log_softmax(changes):
    model = make_model(**changes)
    asked = draw_requests(model)
    # Two continuations that the model itself would choose, one of them in all tokens but the last.
    seed = np.arange(5)
    best = np.asarray(forward(model, COMPUTE, make_params(model), seed[None])).argmax(-1)
    asked += [Request(seed, best[0, -1:]), Request(seed, [best[0, -1], model.vocab - 1])]

    for request, found in zip(asked, run(model, asked), strict=True):
        logprobs, is_greedy = read_off(model, request)
        assert found.logprobs.dtype == np.float32
        np.testing.assert_allclose(found.logprobs, logprobs, rtol=0, atol=1e-5)
        assert found.total == found.logprobs.astype(np.float64).sum()
        assert found.is_greedy == is_greedy and found.cut == 0
    assert [found.is_greedy for found in run(model, asked)][-2:] == [True, False]


def test_bfloat16_multiplies_as_the_model_does():
    model = make_model(**MODERN)
    compute = replace(COMPUTE, dtype="bfloat16")
    asked = draw_requests(model)
    for request, found in zip(asked, run(model, asked, compute), strict=True):
        logprobs, _ = read_off(model, request, compute)
        np.testing.assert_allclose(found.logprobs, logprobs, rtol=0, atol=0.05)
        plain, _ = read_off(model, request)
        assert abs(found.logprobs - plain).max() > 1e-5  # it was not computed in float32


def test_a_batch_equals_requests_alone(monkeypatch):
    """Padding, the order and the sizes of batches and chunks leave each score as it is."""
    model = make_model(**MODERN)
    asked = draw_requests(model)
    together = run(model, asked)
    alone = [run(model, [request])[0] for request in asked]
    monkeypatch.setattr(score_batches, "TOKENS", 64)
    monkeypatch.setattr(score_batches, "LOGITS", 64)
    small = run(model, asked[::-1])[::-1]
    fitted = [fit_request("request", r, 48, 40) for r in asked]
    assert len(list(make_batches(make_groups(fitted, model, 1, True), model, 1))) > 3
    for found, *others in zip(together, alone, small, strict=True):
        for other in others:
            np.testing.assert_allclose(other.logprobs, found.logprobs, rtol=0, atol=1e-5)
            assert other.is_greedy == found.is_greedy


def test_a_capacity_in_training_changes_no_score():
    model = make_model(position="rotary", dispatch="capacity", **EXPERTS)
    said = []
    found = run(model, draw_requests(model), report=said.append)
    expected = run(replace(model, dispatch="dropless"), draw_requests(model))
    assert [one.total for one in found] == [one.total for one in expected]
    assert len(said) == 1 and "scored dropless" in said[0]


@pytest.mark.parametrize(
    "shape, changes",
    [
        (dict(data=2, fsdp=2), {}),
        (dict(fsdp=2, tensor=2), {}),
        (dict(data=2, pipeline=2), {}),
        (dict(data=2, context=2), {}),
        (dict(data=2, expert=2), EXPERTS),
        (dict(data=2, expert=2), EXPERTS | dict(dispatch="capacity")),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(mesh, shape, changes):
    """Experts have room for a quarter of their tokens in training, and take all of them here."""
    model = make_model(**MODERN | dict(layers=4, windows=(0,), value_embed=False) | changes)
    asked = draw_requests(model)
    plain = run(replace(model, dispatch="dropless"), asked)
    said = []
    devices = mesh(**shape)
    with jax.set_mesh(devices):
        like = make_concrete(abstract_params(model), devices)
        placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), make_params(model), like)
        found = score_requests(model, COMPUTE, placed, asked, said.append)
        logits = compute_logits(model, COMPUTE, placed, np.arange(20), said.append)
    assert len(said) == (2 if model.dispatch == "capacity" else 0)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert one.is_greedy == other.is_greedy
    expected = compute_logits(model, COMPUTE, make_params(model), np.arange(20), lambda line: None)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_logits_are_those_of_a_plain_pass():
    model = make_model()
    params = make_params(model)
    ids = np.arange(20)
    found = compute_logits(model, COMPUTE, params, ids, silent)
    assert found.shape == (20, model.vocab) and found.dtype == np.float32
    np.testing.assert_allclose(found, forward(model, COMPUTE, params, ids[None])[0], atol=1e-5)
    with pytest.raises(UsageError, match="the text has 49 tokens and the model's context holds 1"):
        compute_logits(model, COMPUTE, params, np.zeros(49, int), silent)
    with pytest.raises(UsageError, match="the text: has the id 40; expected 0 to 39"):
        compute_logits(model, COMPUTE, params, np.array([40]), silent)


def test_one_compilation_for_a_bucket(monkeypatch):
    """Requests of many lengths have the buckets 16, 32 and 48. The last batch of each has gaps."""
    monkeypatch.setattr(score_batches, "TOKENS", 160)
    model = make_model(mlp=24)
    shapes = []
    plain = score._run

    def run_and_look(params, batch, *rest):
        shapes.append(batch.columns["tokens"].shape)
        return plain(params, batch, *rest)

    monkeypatch.setattr(score, "_run", run_and_look)
    before = score._score._cache_size()
    lengths = [n for n in range(48) if n % 16]
    run(model, draw_requests(model, [(n, 1) for n in lengths]))
    assert set(shapes) == {(2, 48), (4, 32), (8, 16)} and len(shapes) > 6
    assert score._score._cache_size() == before + 3
    # Other continuations are no other programs.
    run(model, draw_requests(model, [(1 + n // 2, n - n // 2) for n in lengths]))
    assert score._score._cache_size() == before + 3


def test_no_logits_leave_the_device():
    """What the program returns is two numbers a place."""
    model = make_model()
    shapes = jax.eval_shape(
        partial(score._score, model=model, compute=COMPUTE, chunk=8),
        make_params(model),
        {"tokens": np.zeros((4, 16), np.int32)},
        np.zeros((4, 16), np.int32),
        np.zeros((4, 16), np.int32),
        np.int32(2),
    )
    assert [(x.shape, str(x.dtype)) for x in shapes] == [((4, 16), "float32"), ((4, 16), "bool")]


def test_a_bigram_model_has_the_likelihoods_of_its_table():
    """Blocks that add nothing leave logits = embedding of the token times the head."""
    model = make_model(
        layers=1, embed=16, vocab=16, position="none", tied=False, bias=False, final_norm=False
    )
    table = np.random.default_rng(3).dirichlet(np.ones(16), size=16)
    params = jax.tree.map(jnp.zeros_like, make_params(model))
    params["embed"]["table"] = jnp.eye(16)
    params["head"]["kernel"] = jnp.log(jnp.asarray(table, jnp.float32))

    ids = np.random.default_rng(4).integers(0, 16, 101)
    asked = make_rolling_requests(ids[1:], int(ids[0]), model.max_seq)
    found = score_requests(model, COMPUTE, params, asked, silent)
    expected = np.log(table[ids[:-1], ids[1:]]).sum()
    assert sum(one.total for one in found) == pytest.approx(expected, abs=1e-4)
    assert sum(len(one.logprobs) for one in found) == 100
    likely = Request([5], [table[5].argmax()])
    assert score_requests(model, COMPUTE, params, [likely], silent)[0].is_greedy


# ---- requests ----


def test_a_context_that_does_not_fit_loses_its_first_tokens():
    model = make_model()
    long, short = draw_requests(model, [(60, 5), (3, 5)])
    said = []
    found = run(model, [long, short], report=said.append)
    # The last token is predicted and not read, so 49 ids fit a context of 48.
    kept = Request(long.context[-44:], long.continuation)
    np.testing.assert_allclose(found[0].logprobs, read_off(model, kept)[0], rtol=0, atol=1e-5)
    assert [one.cut for one in found] == [16, 0]
    assert said == [
        "1 of 2 requests do not fit the context of 48 tokens; the first tokens of their contexts "
        "were left out"
    ]
    whole = draw_requests(model, [(5, 48)])
    assert run(model, whole, report=said.append)[0].cut == 4


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request([], [1]), "request 1: its context has no tokens"),
        (Request([1], []), "request 1: its continuation has no tokens"),
        (Request([1], [2] * 49), "its continuation has 49 tokens and the model's context holds 48"),
        (Request([1], [40]), "request 1: has the id 40; expected 0 to 39"),
        (Request([-1], [4]), "request 1: has the id -1; expected 0 to 39"),
    ],
)
def test_requests_that_cannot_be(request_, words):
    with pytest.raises(UsageError, match=words):
        run(make_model(), [request_])


def test_texts_become_pairs():
    """White space moves to the continuation. An empty context is the end of a text."""
    tokenizer = make_byte_tokenizer()
    pairs = [("ab  ", "cd"), ("", "cd"), (" ", "c"), ("ab", " c")]
    found = [tuple(map(list, one)) for one in encode_pairs(tokenizer, pairs)]
    assert found == [
        (list(b"ab"), list(b"  cd")),
        ([256], list(b"cd")),
        ([256], list(b" c")),
        (list(b"ab"), list(b" c")),
    ]
    with pytest.raises(UsageError, match="an empty context: the char tokenizer has no end-of-text"):
        encode_pairs(make_char_tokenizer("abc"), [("", "a")])


def test_the_whole_text_is_encoded_and_cut(monkeypatch):
    """A vocabulary that joins letters across the cut: the rest has the ids of the whole text."""
    pieces = ("a", "b", "ab", "c")

    def encode(texts):
        texts = [text.replace("ab", "2").translate(str.maketrans("abc", "013")) for text in texts]
        return [np.array(list(map(int, text)), np.int32) for text in texts]

    tokenizer = replace(
        make_byte_tokenizer(), pieces=tuple(piece.encode() for piece in pieces), encoder=encode
    )
    [request] = encode_pairs(tokenizer, [("a", "bc")])
    assert (list(request.context), list(request.continuation)) == ([0], [3])
    # A continuation that begins with the start token is not given another one.
    tokenizer = replace(tokenizer, eot=0)
    [request] = encode_pairs(tokenizer, [("", "acb")])
    assert (list(request.context), list(request.continuation)) == ([0], [3, 1])


def test_windows_score_each_token_once():
    ids = np.arange(100)
    windows = make_rolling_requests(ids, 999, 64)
    assert [(len(a), len(b)) for a, b in windows] == [(1, 64), (29, 36)]
    assert np.concatenate([b for _, b in windows]).tolist() == ids.tolist()
    assert list(windows[0].context) == [999]
    assert windows[1].context.tolist() == list(range(35, 64))
    for size in (0, 1, 7, 64, 65, 128, 130):
        windows = make_rolling_requests(np.arange(size), 999, 64)
        assert [int(x) for _, b in windows for x in b] == list(range(size))
        assert all(len(a) + len(b) <= 65 and len(a) for a, b in windows)
    assert requests.make_rolling_requests([], 999, 64) == []
