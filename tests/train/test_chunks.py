"""A loss in chunks makes its gradient in the forward pass, and makes its logits once.

Shapes: B batch, T sequence, D embed, V vocab.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import list_matmuls, trace

from gpt_jax import config
from gpt_jax.model.transformer import init_params
from gpt_jax.run.parts import make_network
from gpt_jax.train.objectives import Readout, next_token, sum_cross_entropy, sum_logits
from gpt_jax.train.step import eval_step, gradients

B, T, D, V = 2, 64, 16, 56
CHUNK = 16
TRAIN = config.Train(seq_len=T, batch_size=B, z_loss=0.1, label_smoothing=0.2)
CHUNKED = replace(TRAIN, loss_chunk=CHUNK)


def build(dtype="float32", **model):
    """(network, parameters) of a model that is nothing but small."""
    sizes = dict(layers=1, embed=D, heads=2, vocab=V, max_seq=T, logit_softcap=2.0)
    sizes["bias"] = False  # Key biases have no gradient but that of rounding.
    settings = config.resolve(
        config.Config(
            model=config.Model(**sizes | model),
            compute=config.Compute(dtype=dtype, kernel="reference"),
        )
    )
    params = init_params(settings.model, jax.random.key(0))
    # Larger than at the start, so that softcap, smoothing and z-loss all bend the gradient.
    params = jax.tree.map(lambda x: 5 * x, params)
    return make_network(settings.model, settings.compute), params


def make_batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T))),
        "targets": jnp.asarray(rng.integers(0, V, (B, T))),
        "weight": jnp.asarray(rng.random((B, T)) < 0.7, jnp.float32),
        "bytes": jnp.ones((B, T), jnp.int32),
    }


def close(ours, theirs, rel=1e-5):
    scale = max(np.abs(np.float32(theirs)).max(), 1e-30)
    np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=0, atol=rel * scale)


# ---- gradients -----------------------------------------------------------------------------------


def find_gradient(train, dtype, tied):
    """(gradient, Sums). The objective is one term of what is minimised."""
    network, params = build(dtype, tied=tied)

    def total(params):
        sums = next_token(network, params, {}, make_batch(), None, train)
        return 3 * sums["objective"][0] + 1e-3 * jnp.square(sums["objective"][0]), sums

    return jax.jit(jax.grad(total, has_aux=True))(params)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_all_logits_at_once(tied):
    """With label smoothing, z-loss and softcap."""
    chunked = find_gradient(CHUNKED, "float32", tied)
    jax.tree.map(close, chunked, find_gradient(TRAIN, "float32", tied))


@pytest.mark.parametrize("tied", [True, False])
def test_rounding_is_that_of_all_logits_at_once(tied):
    """In bfloat16, gradients in chunks are as near to those of float32 as the whole ones are."""
    exact, _ = find_gradient(TRAIN, "float32", tied)

    def find_errors(train):
        rounded, _ = find_gradient(train, "bfloat16", tied)
        differences = jax.tree.map(jnp.subtract, rounded, exact)
        return np.array([jnp.linalg.norm(x) for x in jax.tree.leaves(differences)])

    assert (find_errors(CHUNKED) < 1.2 * find_errors(TRAIN)).all()


@pytest.mark.parametrize("name, place", [("loss", 0), ("accuracy", 0), ("objective", 1)])
def test_a_measurement_is_not_differentiated_silently(name, place):
    network, params = build()

    def total(params):
        return next_token(network, params, {}, make_batch(), None, CHUNKED)[name][place]

    with pytest.raises(TypeError, match="gradient of its sum 'objective' alone"):
        jax.grad(total)(params)


def read(network, params, columns, **learned):
    """Sums of a readout whose hidden states do not come from layers."""
    hidden = params["embed"]["table"][make_batch()["tokens"]]
    token_sums = partial(sum_cross_entropy, train=CHUNKED)
    return sum_logits(token_sums, columns, CHUNK, Readout(network, params, hidden), **learned)


def test_the_learned_sum_has_a_name():
    network, params = build()
    batch = make_batch()

    def total(params, **learned):
        return read(network, params, batch, **learned)["loss"][0]

    plain = replace(TRAIN, z_loss=0.0, label_smoothing=0.0)

    def expected(params):
        hidden = params["embed"]["table"][batch["tokens"]]
        logits = network.logits(network.head(params, hidden.dtype), hidden)
        return sum_cross_entropy(logits, batch, plain)["objective"][0]

    ours = jax.grad(partial(total, learned="loss"))(params)
    jax.tree.map(close, ours, jax.grad(expected)(params))
    with pytest.raises(TypeError, match="no sum 'distance'"):
        jax.grad(partial(total, learned="distance"))(params)


def test_columns_have_no_gradient():
    network, params = build()

    def total(weight):
        return read(network, params, make_batch() | {"weight": weight})["objective"][0]

    with pytest.raises(TypeError, match="no gradient by the columns"):
        jax.grad(total)(make_batch()["weight"])


# ---- programs ------------------------------------------------------------------------------------


def find_head_matmuls(equations) -> list[tuple]:
    """Shapes of the operands of matmuls with the vocabulary. A loop's body counts once."""
    shapes = [tuple(shape for _, shape in operands) for operands in list_matmuls(equations)]
    return [pair for pair in shapes if any(V in shape for shape in pair)]


def find_largest(equations) -> int:
    """Entries of the largest array with a dim of the vocabulary."""
    arrays = [variable.aval for equation in equations for variable in equation.outvars]
    return max(x.size for x in arrays if V in getattr(x, "shape", ()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_made_once(dtype):
    """Three matmuls with a chunk's logits or their gradient, in one loop, and none after it."""
    network, params = build(dtype)

    def find(params):
        return gradients(network, params, {}, make_batch(), jax.random.key(0), CHUNKED)

    equations = trace(find, params)
    rows = B * CHUNK
    logits = (rows, D), (D, V)
    by_hidden = (rows, V), (D, V)
    by_head = (rows, V), (rows, D)
    assert sorted(find_head_matmuls(equations)) == sorted([logits, by_hidden, by_head])
    assert find_largest(equations) == max(rows * V, V * D)


def test_evaluation_makes_no_gradient():
    network, params = build()
    equations = trace(partial(eval_step, network=network, train=CHUNKED), params, {}, make_batch())
    assert find_head_matmuls(equations) == [((B * CHUNK, D), (D, V))]


def test_a_frozen_model_makes_no_gradient():
    """Its logits are made, and no more: four matmuls for two models, and not six."""
    network, params = build()
    batch = make_batch()

    def sum_distance(ours, theirs, columns):
        weight = columns["weight"]
        distance = jnp.square(ours - theirs).mean(-1)
        return {"objective": ((distance * weight).sum(), weight.sum())}

    def total(params, frozen):
        readouts = [
            Readout(network, tree, tree["embed"]["table"][batch["tokens"]])
            for tree in (params, frozen)
        ]
        weights = {"weight": batch["weight"]}
        return sum_logits(sum_distance, weights, CHUNK, *readouts)["objective"][0]

    assert len(find_head_matmuls(trace(jax.grad(total), params, params))) == 4
