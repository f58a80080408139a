"""Dropout keeps the mean, needs a key, and differs by layer."""

from dataclasses import replace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from plain_model import np_layer
from variants import apply, close, make_batch, make_model, random_params

from gpt_jax.model.layers.dropout import dropout


def test_dropout_keeps_the_mean_and_needs_a_key():
    class Module:
        has_rng = staticmethod(lambda name: True)
        make_rng = staticmethod(lambda name: jax.random.key(0))

    x = jnp.ones((8, 64, 16))
    dropped = np.asarray(dropout(Module, x, 0.25))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert dropout(Module, x, 0.0) is x
    Module.has_rng = staticmethod(lambda name: False)
    assert dropout(Module, x, 0.25) is x


def test_dropout_differs_by_layer_and_key_and_only_with_a_key():
    """Every branch outputs ones (kernels 0, biases 1), so a layer adds its masks to the stream."""
    model = make_model(layers=5, windows=(2, 0), last_window_full=True, dropout=0.5)
    params = random_params(model)
    params["blocks"], params["tail"] = (
        jax.tree_util.tree_map_with_path(
            lambda path, x: (
                np.float32(path[-1].key == "bias" and path[-2].key in ("out", "down"))
                * np.ones_like(x)
            ),
            params[name],
        )
        for name in ("blocks", "tail")
    )

    @jax.jit
    def stream(keys):
        batch = {"tokens": make_batch()["tokens"]}

        def run(rngs):
            return apply(model, params, batch, rngs=rngs, mutable="intermediates")[1]

        return *(run({"dropout": key}) for key in keys), run({})

    one, again, other, without = (
        np.stack(
            [
                np.asarray(np_layer(tree["intermediates"], i)["residual"][0])
                for i in range(model.layers)
            ]
        )
        for tree in stream([jax.random.key(n) for n in (0, 0, 1)])
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.3
    np.testing.assert_allclose(np.diff(without, axis=0), 2, rtol=1e-4)
    added = np.diff(one, axis=0).round(3)
    assert set(np.unique(added)) == {0, 2, 4}  # two masks of 0 or 1 / (1 - rate)
    for i in range(len(added)):
        assert added[i].mean() == pytest.approx(2, abs=0.15)
        assert all((added[i] != added[j]).mean() > 0.3 for j in range(i))


def test_attention_dropout_keeps_the_mean_and_needs_a_key():
    """The stream is linear in the probabilities, without feed-forward and final norm."""
    model = make_model(layers=1, attention_dropout=0.5, final_norm=False)
    params = random_params(model)
    tokens = make_batch()["tokens"][:4]
    params["blocks"]["0"]["mlp"] = jax.tree.map(jnp.zeros_like, params["blocks"]["0"]["mlp"])

    @jax.jit
    def run(keys):
        def one(**more):
            return apply(model, params, {"tokens": tokens}, method="features", **more)[0]

        plain = apply(
            replace(model, attention_dropout=0.0), params, {"tokens": tokens}, method="features"
        )[0]
        return jax.vmap(lambda key: one(rngs={"dropout": key}))(keys), one(), plain

    many, without, plain = run(jax.random.split(jax.random.key(0), 400))
    close(without, plain, 1e-6)
    assert (many[0] != many[1]).mean() > 0.5
    assert np.abs(many.mean(0) - plain).mean() < 0.1 * np.abs(many - plain).mean()


def test_the_embedding_is_dropped_too():
    """The layers add nothing, so the output is the embedding, each entry zero or doubled."""
    model = make_model(layers=1, dropout=0.5, final_norm=False)
    params = random_params(model)
    tokens = make_batch()["tokens"]
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])

    def run(**more):
        return np.asarray(apply(model, params, {"tokens": tokens}, method="features", **more)[0])

    plain = run()
    dropped = run(rngs={"dropout": jax.random.key(0)})
    assert 0.4 < (dropped == 0).mean() < 0.6
    np.testing.assert_allclose(dropped[dropped != 0], 2 * plain[dropped != 0], rtol=1e-6)
