"""Values by name: each against the same value made of others by hand, and free where none is asked.

Shapes: B batch, T query, S key, D embed, N heads, H head_dim.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model import capture, list_layers, list_names
from gpt_jax.model.attention.kernels import KERNELS
from gpt_jax.model.transformer import REFERENCE, Transformer, init_params

B, T, V, LAYERS = 4, 8, 24, 5
PERIOD = 2  # windows (3, 0): two kinds of layers, twice, and a tail of one


@pytest.fixture(scope="module")
def model() -> config.Model:
    wanted = config.Model(
        layers=LAYERS, embed=16, heads=4, vocab=V, max_seq=T, windows=(3, 0), bias=True
    )
    return config.resolve(config.Config(model=wanted, train=config.Train(seq_len=T))).model


@pytest.fixture(scope="module")
def params(model):
    """Random everywhere, so that no part is zero."""

    def draw(path, x):
        key = jax.random.key(abs(hash(jax.tree_util.keystr(path))) % 2**31)
        return 0.3 * jax.random.normal(key, x.shape)

    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, like)


@pytest.fixture(scope="module")
def batch():
    """Two documents in each row."""
    tokens = np.random.default_rng(0).integers(0, V, (B, T))
    segment = np.tile([1] * 5 + [2] * (T - 5), (B, 1))
    return {"tokens": jnp.asarray(tokens), "segment": jnp.asarray(segment)}


def take(model, params, batch, *names, compute=REFERENCE):
    return jax.jit(lambda p, b: capture(model, compute, p, b, names))(params, batch)


def test_layers_add_up_to_the_stream(model, params, batch):
    """What a layer adds is what its two halves return; the last stream is what is read out."""
    names = ("*/residual", "*/attention", "*/mlp", "embed", "position", "final_norm")
    values = take(model, params, batch, *names)
    assert values["blocks/0/residual"].shape == (LAYERS // PERIOD, B, T, 16)
    assert values["tail/0/residual"].shape == (B, T, 16)

    stream = values["embed"] + values["position"]
    parts = (list_layers(values, what) for what in ("residual", "attention", "mlp"))
    layers = list(zip(*parts, strict=True))
    assert len(layers) == LAYERS
    for after, attention, mlp in layers:
        stream = stream + attention + mlp
        np.testing.assert_allclose(after, stream, atol=1e-5)
        stream = after

    hidden, _ = Transformer(model).apply({"params": params}, batch, method="features")
    np.testing.assert_allclose(values["final_norm"], hidden, atol=1e-5)


def test_attention_maps_are_those_of_queries_and_keys(model, params, batch):
    names = ("*/attention/weights", "*/mixer_norm", "*/attention")
    values = take(model, params, batch, *names)
    assert values["blocks/1/attention/weights"].shape == (LAYERS // PERIOD, B, 4, T, T)

    maps = list_layers(values, "attention/weights")
    inputs = list_layers(values, "mixer_norm")
    outputs = list_layers(values, "attention")
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    same = np.asarray(batch["segment"])[:, :, None] == np.asarray(batch["segment"])[:, None]

    for layer in range(LAYERS):
        tail = layer == LAYERS - 1
        weights = params["tail"]["0"] if tail else params["blocks"][str(layer % PERIOD)]
        weights = weights["attention"]

        def project(x, name):
            pick = (lambda w: w) if tail else (lambda w: w[layer // PERIOD])
            return np.asarray(x @ pick(weights[name]["kernel"]) + pick(weights[name]["bias"]))

        def heads(name):
            return project(inputs[layer], name).reshape(B, T, 4, 4)

        q, k, v = heads("q"), heads("k"), heads("v")
        mask = (key <= query) & same
        if layer % PERIOD == 0:
            mask &= query - key < 3
        scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / 2, -np.inf)
        theirs = np.exp(scores - scores.max(-1, keepdims=True))
        theirs /= theirs.sum(-1, keepdims=True)
        np.testing.assert_allclose(maps[layer], theirs, atol=1e-5)

        mixed = np.einsum("bnts,bsnh->btnh", maps[layer], v).reshape(B, T, 16)
        np.testing.assert_allclose(project(mixed, "out"), outputs[layer], atol=1e-5)


def test_without_taps_the_program_is_as_if_there_were_none(model, params, batch, monkeypatch):
    def trace(run):
        # A function that JAX has not seen, because it would give the trace that it has kept.
        return str(jax.make_jaxpr(lambda params, batch: run(params, batch))(params, batch))

    def plain(params, batch):
        return Transformer(model).apply({"params": params}, batch, method="features")[0]

    def tapped(params, batch):
        return capture(model, REFERENCE, params, batch, ("*/attention/weights",))

    ours = trace(plain)
    assert ours != trace(tapped)
    assert ours == trace(plain)  # a capture leaves nothing behind
    monkeypatch.setattr(nn.Module, "sow", lambda *args: False)
    monkeypatch.setitem(KERNELS, "reference", KERNELS["reference"]._replace(weights=None))
    assert ours == trace(plain)


def test_one_device_and_a_split_model_agree(model, params, batch, mesh):
    names = ("*/residual", "*/weights")
    alone = take(model, params, batch, *names)
    split = mesh(2, 2, 2)
    with jax.set_mesh(split):
        like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        laid_out = jax.tree.map(
            lambda x, y: jax.device_put(x, jax.NamedSharding(split, y.sharding.spec)), params, like
        )
        columns = sharding.to_devices(split, jax.tree.map(np.asarray, batch), B)
        values = take(model, laid_out, columns, *names)
    assert values.keys() == alone.keys() and len(values) == 2 * (PERIOD + 1)
    for name, value in alone.items():
        np.testing.assert_allclose(values[name], value, atol=1e-5)


def test_a_kernel_without_maps_is_named_with_the_way_out(model, params, batch):
    blocked = replace(REFERENCE, kernel="blocked")
    ours = take(model, params, batch, "blocks/0/residual", compute=blocked)
    theirs = take(model, params, batch, "blocks/0/residual")
    np.testing.assert_allclose(ours["blocks/0/residual"], theirs["blocks/0/residual"], atol=1e-5)
    with pytest.raises(UsageError, match=r"'blocked': has no attention map.*kernel='reference'"):
        take(model, params, batch, "blocks/0/attention/weights", compute=blocked)


def test_an_unknown_name_lists_the_nearest(model, params, batch):
    with pytest.raises(UsageError, match=r"'blocks/0/residul' is no value .* blocks/0/residual,"):
        take(model, params, batch, "embed", "blocks/0/residul")
    known = list_names(model, REFERENCE, params, batch)
    assert known["tail/0/attention/weights"].shape == (B, 4, T, T)
    assert {"embed", "position", "final_norm", "blocks/1/mlp_norm"} < known.keys()
    assert not any(name.endswith("/kernel") or name.endswith("attention/q") for name in known)


def test_stages_are_refused(model, params, batch, mesh):
    with jax.set_mesh(mesh(pipeline=2)), pytest.raises(UsageError, match="pipeline"):
        capture(model, REFERENCE, params, batch, ("embed",))
