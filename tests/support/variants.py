"""Variants of the model, small, with random parameters and a batch.

Parameters are drawn at random from the abstract tree, so that nothing starts at zero and no
initialiser is compiled.
"""

from functools import cache

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from gpt_jax import config
from gpt_jax.model.transformer import REFERENCE, Transformer, abstract_params

T = 10
V = 29
BASE = dict(layers=3, embed=16, heads=4, vocab=V, max_seq=T)
VARIANTS = {
    "gpt2": {},
    "llama3": dict(
        norm="rmsnorm",
        position="rotary",
        rope_base=500.0,
        rope_scale_factor=8.0,
        head_dim=8,
        kv_heads=2,
        rope_scale_original_seq=256,
        pattern=(("attention", "swiglu"),),
        tied=False,
        bias=False,
    ),
    "modern": dict(
        layers=5,
        norm="plain_rmsnorm",
        norm_epsilon=0.01,
        position="rotary",
        embed_norm=True,
        tied=False,
        bias=False,
        pattern=(("attention", "relu2"),),
        logit_softcap=3.0,
        qk_norm=True,
        qk_norm_after_rope=True,
        qk_scale=1.2,
        value_embed=True,
        value_embed_gate=3,
        residual_scalars=True,
        smear=True,
        smear_gate=5,
        backout=True,
        windows=(2, 0),
        last_window_full=True,
    ),
    "gemma2": dict(
        norm="rmsnorm",
        norm_epsilon=0.02,
        position="rotary",
        kv_heads=1,
        head_dim=6,
        pattern=(("attention", "geglu"),),
        attention_softcap=0.7,
        logit_softcap=2.0,
        windows=(3, 0),
        qk_norm=True,
        mlp=24,
        layers=2,
    ),
    "guide": dict(
        norm_position="post", pattern=(("attention", "relu"),), norm_epsilon=1e-6, final_norm=False
    ),
    "neox": dict(
        position="rotary",
        rope_fraction=0.5,
        head_dim=8,
        pattern=(("attention", "gelu"),),
        qkv_bias=False,
    ),
    "sinusoidal": dict(position="sinusoidal", embed=15, heads=3, windows=(4,), norm_epsilon=1e-3),
    "mixed": dict(
        position="none",
        pattern=(("attention", "relu"), ("attention", "swiglu")),
        qk_norm=True,
        layers=4,
    ),
    "gemma3": dict(
        norm="unit_rmsnorm",
        norm_position="sandwich",
        position="rotary",
        rope_base=1000.0,
        rope_local_base=20.0,
        rope_scaling="linear",
        rope_scale_factor=3.0,
        kv_heads=2,
        head_dim=6,
        pattern=(("attention", "geglu"),),
        windows=(3, 0),
        attention_scale=0.3,
        embed_scale=4.0,
        qk_norm=True,
        bias=False,
    ),
    "olmo2": dict(
        norm="rmsnorm",
        norm_position="branch",
        position="rotary",
        kv_heads=2,
        pattern=(("attention", "swiglu"),),
        qk_norm=True,
        qk_norm_over="all",
        tied=False,
        bias=False,
    ),
    "parallel_neox": dict(
        position="rotary", rope_fraction=0.5, parallel=True, pattern=(("attention", "gelu"),)
    ),
    "qwen2": dict(
        norm="rmsnorm", position="rotary", kv_heads=2, bias=False, biased="qkv", windows=(0, 4)
    ),
    "biased_attention": dict(norm="rmsnorm", position="rotary", bias=False, biased="attention"),
    "biased_mlp": dict(
        norm="unit_rmsnorm", bias=False, biased="mlp", qk_norm=True, qk_norm_over="all"
    ),
}


def make_compute(**changes) -> config.Compute:
    """Computes with the plain kernel."""
    return config.Compute(kernel="reference", **changes)


def make_model(name="gpt2", **changes) -> config.Model:
    """A variant with a few fields changed."""
    model = config.Model(**(BASE | VARIANTS[name] | changes))
    run = config.Config(model=model, train=config.Train(seq_len=model.max_seq))
    return config.resolve(run).model


def random_params(model, seed=0):
    """Normal draws in the shapes of the model's parameters. Scales are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        size = {"scale": 0.2, "x": 0.2, "x0": 0.2, "bias": 0.1}.get(
            name, 0.5 if name == "table" else 0.3
        )
        return jnp.float32((name in ("scale", "x")) + size * rng.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def make_batch():
    """Rows 0 … T are one document, and row s has another token s - 1.

    Then two documents come packed in one row with padding behind, and each of them on its own.
    """
    rng = np.random.default_rng(1)
    tokens = np.tile(rng.integers(0, V, T), (T + 4, 1))
    for s in range(T):
        tokens[s + 1, s] = (tokens[0, s] + 1 + rng.integers(V - 1)) % V
    segment = np.ones((T + 4, T), int)
    position = np.tile(np.arange(T), (T + 4, 1))
    segment[T + 1] = [1] * 5 + [2] * 3 + [0] * 2
    position[T + 1] = [*range(5), *range(3), 0, 0]
    segment[T + 2], segment[T + 3] = [1] * 5 + [0] * 5, [1] * 3 + [0] * 7
    tokens[T + 3, :3] = tokens[T + 1, 5:8]
    return {"tokens": tokens, "segment": segment, "position": position}


def apply(model, params, batch, compute=REFERENCE, **more):
    """The logits of a batch."""
    return Transformer(model, compute).apply({"params": params}, batch, **more)


@cache
def logits_of(name):
    """The logits [T + 4, T, V] of a variant for `make_batch`."""
    model = make_model(name)
    return np.asarray(jax.jit(lambda p, b: apply(model, p, b))(random_params(model), make_batch()))


def close(ours, theirs, rel=2e-5):
    """Raises AssertionError if an entry differs by more than `rel` of the largest."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())


def equations(jaxpr):
    """Every equation of a jaxpr and of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
