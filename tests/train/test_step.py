"""The objective against numpy's log-softmax; microbatches and chunks against the whole; and the
step's bookkeeping.

The network here is a lookup and a matmul, so that each program compiles in a moment.
Shapes: B batch, T sequence, D embed, V vocab.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import config
from gpt_jax.train.objectives import (
    OBJECTIVES,
    Network,
    Readout,
    add_report,
    next_token,
    sum_cross_entropy,
    sum_logits,
)
from gpt_jax.train.step import eval_step, gradients, init_state, train_step

B, T, D, V = 6, 8, 5, 7
PLAIN = config.Train(seq_len=T, batch_size=B)


def make_batch(seed=0):
    """Rows whose share of learned tokens runs from none to all."""
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, V, (B, T)),
        "targets": rng.integers(0, V, (B, T)),
        "weight": (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32),
        "bytes": rng.integers(0, 5, (B, T)),
    }


def make_params(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "table": jnp.float32(rng.standard_normal((V, D))),
        "head": jnp.float32(rng.standard_normal((D, V))),
    }


def features(params, batch, key):
    x = params["table"][batch["tokens"]]
    return (x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)), {}


class Traits(NamedTuple):
    role: str
    stacked: bool = False


NETWORK = Network(
    features,
    lambda params, dtype: params["head"].astype(dtype),
    lambda head, hidden: hidden @ head,
    lambda path: Traits("matrix"),
)


def close(ours, theirs, rel=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * max(np.abs(theirs).max(), 1e-30))


# ---- next_token ----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_cross_entropy_equals_numpy(smoothing, z_loss):
    batch, rng = make_batch(), np.random.default_rng(2)
    batch["weight"] *= 1 + rng.integers(0, 2, (B, T))  # weights need not be 0 or 1
    logits = rng.integers(-3, 3, (B, T, V)).astype(
        np.float64
    )  # whole numbers: ties for the best are frequent
    ours = sum_cross_entropy(
        jnp.float32(logits), batch, replace(PLAIN, label_smoothing=smoothing, z_loss=z_loss)
    )

    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs, weight = logits - log_z, batch["weight"]
    wanted = np.eye(V)[batch["targets"]]
    nats = -(wanted * log_probs).sum(-1)
    smoothed = (
        -(((1 - smoothing) * wanted + smoothing / V) * log_probs).sum(-1)
        + z_loss * log_z[..., 0] ** 2
    )
    right = logits.argmax(-1) == batch["targets"]  # numpy's argmax takes the first of equals
    theirs = {
        "objective": (smoothed * weight, weight),
        "loss": (nats * weight, weight),
        "accuracy": (right * weight, weight),
        "bits_per_byte": (nats * weight / math.log(2), None),
    }
    assert ours.keys() == theirs.keys()
    for name, (value, divisor) in theirs.items():
        assert float(ours[name][0]) == pytest.approx(value.sum(), rel=1e-5), name
        if divisor is not None:
            assert float(ours[name][1]) == divisor.sum(), name


def test_ties_go_to_the_first():
    batch = make_batch() | {"targets": np.zeros((B, T), int), "weight": np.ones((B, T), np.float32)}

    def accuracy(batch):
        return float(sum_cross_entropy(jnp.zeros((B, T, V)), batch, PLAIN)["accuracy"][0])

    assert accuracy(batch) == B * T
    assert accuracy(batch | {"targets": np.full((B, T), V - 1)}) == 0


def test_bytes_count_where_there_is_something_to_learn():
    batch = make_batch()
    sums = sum_cross_entropy(jnp.zeros((B, T, V)), batch, PLAIN)
    nats, learned = math.log(V) * batch["weight"].sum(), (batch["bytes"] * batch["weight"]).sum()
    assert float(sums["bits_per_byte"][0] / sums["bits_per_byte"][1]) == pytest.approx(
        nats / math.log(2) / learned
    )


def test_large_logits_stay_finite():
    logits = jnp.full((B, T, V), -1e30).at[..., 3].set(1e4)
    sums = sum_cross_entropy(logits, make_batch() | {"targets": np.full((B, T), 3)}, PLAIN)
    assert (
        float(sums["loss"][0]) == 0 and float(sums["accuracy"][0]) == make_batch()["weight"].sum()
    )


# ---- gradients -----------------------------------------------------------------------------------


def run(train, batch=None, key=None, params=None, frozen=None):
    params, batch, frozen = params or make_params(), batch or make_batch(), frozen or {}
    if key is not None:
        return jax.jit(partial(gradients, NETWORK, train=train))(params, frozen, batch, key)
    network = NETWORK._replace(features=lambda params, batch, key: features(params, batch, None))
    return jax.jit(partial(gradients, network, train=train))(
        params, frozen, batch, jax.random.key(0)
    )


def test_gradient_is_that_of_the_weighted_mean():
    batch = make_batch()
    rows, columns = np.nonzero(batch["weight"])

    def mean(params):
        log_probs = jax.nn.log_softmax(params["table"][batch["tokens"]] @ params["head"])
        return -log_probs[rows, columns, batch["targets"][rows, columns]].mean()

    jax.tree.map(close, run(PLAIN)[0], jax.grad(mean)(make_params()))


@pytest.mark.parametrize(
    "accumulate, chunk", [(2, 0), (3, 0), (6, 0), (1, 2), (1, 8), (1, 1), (3, 4)]
)
def test_microbatches_and_chunks_equal_the_whole(accumulate, chunk):
    """Rows learn from none to all of their tokens, so a mean of means would be far off."""
    smooth = replace(PLAIN, z_loss=0.1, label_smoothing=0.1)
    (grads, sums), (whole_grads, whole_sums) = (
        run(train) for train in (replace(smooth, accumulate=accumulate, loss_chunk=chunk), smooth)
    )
    jax.tree.map(close, grads, whole_grads)
    jax.tree.map(close, sums, whole_sums)


def test_gradient_only_where_there_is_weight():
    batch = make_batch()
    grad = jax.grad(
        lambda x: sum_cross_entropy(x, batch, replace(PLAIN, z_loss=0.1, label_smoothing=0.1))[
            "objective"
        ][0]
    )
    moved = (
        np.abs(grad(jnp.float32(np.random.default_rng(3).standard_normal((B, T, V))))).max(-1) > 0
    )
    np.testing.assert_array_equal(moved, batch["weight"] > 0)


@pytest.mark.parametrize("changes", [{}, dict(accumulate=3), dict(loss_chunk=4)])
def test_a_batch_without_weight_gives_zeros(changes):
    grads, sums = run(
        replace(PLAIN, **changes), make_batch() | {"weight": np.zeros((B, T), np.float32)}
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    assert all(float(sums[name][1]) == 0 for name in ("objective", "loss", "accuracy"))


def test_a_batch_without_weight_learns_nothing_from_terms_without_targets(monkeypatch):
    """The balance of experts is such a term: it has a gradient, and no weight of its own."""

    def balanced(network, params, frozen, batch, key, train):
        sums = next_token(network, params, frozen, batch, key, train)
        total, weight = sums["objective"]
        return sums | {"objective": (total + (params["head"] ** 2).sum(), weight)}

    monkeypatch.setitem(OBJECTIVES, "next_token", balanced)
    empty = make_batch() | {"weight": np.zeros((B, T), np.float32)}
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(run(PLAIN, empty)[0]))

    grads, sums = run(PLAIN)
    plain = jax.grad(lambda params: (params["head"] ** 2).sum())(make_params())
    monkeypatch.undo()
    weight = float(sums["objective"][1])
    close(grads["head"], run(PLAIN)[0]["head"] + plain["head"] / weight)


def test_microbatches_draw_their_own_randomness():
    batch = {
        name: np.repeat(column[-1:], B, 0) for name, column in make_batch().items()
    }  # equal rows
    two, one = (
        run(replace(PLAIN, accumulate=k), batch, jax.random.key(0))[1]["loss"][0] for k in (2, 1)
    )
    halves = [
        next_token(
            NETWORK,
            make_params(),
            {},
            {k: v[::2] for k, v in batch.items()},
            jax.random.fold_in(jax.random.key(0), i),
            PLAIN,
        )["loss"][0]
        for i in range(2)
    ]
    assert abs(float(halves[0] - halves[1])) > 1e-3
    assert float(two) == pytest.approx(float(sum(halves)), rel=1e-5) and float(two) != float(one)


# ---- frozen parameters ---------------------------------------------------------------------------


def sum_kl(logits, reference, columns):
    """Sums of the divergence from the reference, KL(reference || ours), of each token."""
    ours = jax.nn.log_softmax(logits)
    theirs = jax.nn.log_softmax(reference)
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
    weight = columns["weight"]
    return {"objective": ((divergence * weight).sum(), weight.sum())}


def match_reference(network, params, frozen, batch, key, train):
    hidden, report = network.features(params, batch, key)
    reference, _ = network.features(frozen, batch, None)
    readouts = Readout(network, params, hidden), Readout(network, frozen, reference)
    sums = sum_logits(sum_kl, {"weight": batch["weight"]}, train.loss_chunk, *readouts)
    return add_report(sums, report)


@pytest.fixture
def matching(monkeypatch):
    """The config of an objective that compares with a frozen model."""
    monkeypatch.setitem(OBJECTIVES, "match_reference", match_reference)
    return replace(PLAIN, objective="match_reference")


@pytest.mark.parametrize("changes", [{}, dict(accumulate=3), dict(loss_chunk=2)])
def test_a_model_equal_to_its_frozen_copy_stays(matching, changes):
    grads, sums = run(replace(matching, **changes), frozen=make_params())
    assert abs(float(sums["objective"][0])) < 1e-6
    assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("changes", [{}, dict(accumulate=3), dict(loss_chunk=2)])
def test_the_gradient_is_that_of_the_learned_model_alone(matching, changes):
    """The derivative of KL(q || p) by the logits of p is p - q. Of q there is none."""
    batch, params, frozen = make_batch(), make_params(1), make_params(5)
    grads, sums = run(replace(matching, **changes), batch, frozen=frozen)

    hidden = np.asarray(params["table"])[batch["tokens"]]
    p, q = (
        np.asarray(jax.nn.softmax(x["table"][batch["tokens"]] @ x["head"]))
        for x in (params, frozen)
    )
    weight = batch["weight"]
    close(sums["objective"][0], ((q * np.log(q / p)).sum(-1) * weight).sum())

    slope = (p - q) * weight[..., None] / weight.sum()
    close(grads["head"], np.einsum("btd,btv->dv", hidden, slope))
    table = np.zeros((V, D))
    np.add.at(table, batch["tokens"], slope @ np.asarray(params["head"]).T)
    close(grads["table"], table)


def test_the_step_keeps_frozen_out_of_the_state(matching):
    """State and optimiser have the arrays they had; the frozen ones are still there, unchanged."""
    tx, frozen = optax.adam(0.1), make_params(5)
    step = jax.jit(partial(train_step, network=NETWORK, tx=tx, train=matching), donate_argnums=0)
    before = init_state(make_params(), tx, matching)
    shapes = jax.tree.map(jnp.shape, before)
    state, first = step(before, frozen, make_batch(), jax.random.key(0))
    assert jax.tree.map(jnp.shape, state) == shapes
    jax.tree.map(np.testing.assert_array_equal, frozen, make_params(5))

    for _ in range(20):
        state, sums = step(state, frozen, make_batch(), jax.random.key(0))
    assert float(sums["objective"][0]) < 0.2 * float(first["objective"][0])


# ---- steps ---------------------------------------------------------------------------------------


def test_train_step():
    """Parameters move by the optimiser's rule on the mean gradient.

    The key is that of the run and of the step.
    """
    train, tx, key = replace(PLAIN, ema=0.75), optax.sgd(0.5, momentum=0.9), jax.random.key(4)
    step = jax.jit(partial(train_step, network=NETWORK, tx=tx, train=train))
    state = init_state(make_params(), tx, train)
    assert int(state.step) == 0
    params, ema, momentum = (
        make_params(),
        make_params(),
        jax.tree.map(jnp.zeros_like, make_params()),
    )
    for n in range(3):
        state, sums = step(state, {}, make_batch(n), key)
        grads, plain = run(PLAIN, make_batch(n), jax.random.fold_in(key, n), params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m: p - 0.5 * m, params, momentum)
        ema = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, ema, params)
        assert int(state.step) == n + 1
        jax.tree.map(close, (state.params, state.ema), (params, ema))

        def norm(tree):
            return math.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(tree)))

        assert float(sums["loss"][0]) == pytest.approx(float(plain["loss"][0]), rel=1e-5)
        assert float(sums["grad_norm"][0]) == pytest.approx(norm(grads), rel=1e-5)
        assert float(sums["param_norm"][0]) == pytest.approx(norm(params), rel=1e-5)
        assert float(sums["grad_norm"][1]) == float(sums["param_norm"][1]) == 1


def test_state_without_averaging_keeps_none():
    assert init_state(make_params(), optax.sgd(1.0), PLAIN).ema == {}


def test_eval_step_has_no_randomness():
    ours = jax.jit(partial(eval_step, network=NETWORK, train=PLAIN))(
        make_params(), {}, make_batch()
    )
    logits = features(make_params(), make_batch(), None)[0] @ make_params()["head"]
    jax.tree.map(close, ours, sum_cross_entropy(logits, make_batch(), PLAIN))
