"""Layers over depth: the layout that compiles the fewest, the scan, and what remat keeps."""

from functools import cache

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from variants import T, V, apply, equations, make_compute, make_model, random_params

from gpt_jax.config.layers import LayerSpec, layer_specs, layout
from gpt_jax.model.transformer import REFERENCE, abstract_params


def spec_list(text):
    return tuple(LayerSpec("attention", letter, 0, False) for letter in text)


@pytest.mark.parametrize(
    "layers, period, repeats, tail",
    [
        ("a", "a", 1, ""),
        ("aaaa", "a", 4, ""),
        ("abab", "ab", 2, ""),
        ("ababa", "ab", 2, "a"),
        ("aaab", "a", 3, "b"),
        ("aaabaaab", "aaab", 2, ""),
        ("aaabaaabb", "aaab", 2, "b"),
        ("aaaaab", "a", 5, "b"),
        ("abcabcab", "abc", 2, "ab"),
    ],
)
def test_layout_compiles_the_fewest_layers(layers, period, repeats, tail):
    found = layout(spec_list(layers))
    assert found == (spec_list(period), repeats, spec_list(tail))
    assert found.period * found.repeats + found.tail == spec_list(layers)


def test_layer_specs():
    model = make_model("modern", layers=6, windows=(2, 2, 0))
    assert [s.window for s in layer_specs(model)] == [2, 2, 0, 2, 2, 0]
    assert [s.value_embed for s in layer_specs(model)] == [False, True] * 3
    assert [s.window for s in layer_specs(make_model("modern", layers=4, windows=(2,)))] == [
        2,
        2,
        2,
        0,
    ]


DEPTHWISE = {
    "plain": {},
    "unrolled": dict(unroll=0),
    "block": dict(remat="block"),
    "dots": dict(remat="dots"),
    "offload": dict(remat="offload"),
    "names": dict(remat="names", remat_save=("attention", "attention_out", "mlp_in")),
    "names on the host": dict(
        remat="names",
        remat_save=("attention_out",),
        remat_offload=("layer_in", "q", "k", "v", "attention", "mlp_in", "mlp_hidden"),
    ),
}


@cache
def gradient_of(how):
    """(loss, gradients, bytes of temporaries) with dropout.

    Recomputing must draw the same masks.
    """
    model = make_model(layers=4, dropout=0.2, attention_dropout=0.2, max_seq=32)
    compute = make_compute(**DEPTHWISE[how])
    tokens = np.random.default_rng(3).integers(0, V, (8, 32))

    def loss(params, key):
        logits = apply(model, params, {"tokens": tokens}, compute, rngs={"dropout": key})
        return jnp.square(jax.nn.logsumexp(logits, -1)).mean()

    args = random_params(model), jax.random.key(7)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    value, grads = compiled(*args)
    return float(value), grads, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("how", [how for how in DEPTHWISE if how != "plain"])
def test_scan_equals_loop_and_remat_equals_plain(how):
    (value, grads, _), (plain, plain_grads, _) = gradient_of(how), gradient_of("plain")
    assert value == pytest.approx(plain, rel=1e-6)

    # The gradient of a bias on keys is 0, because a softmax does not see it, and what comes out is
    # rounding. So a leaf is measured by its largest entry, or by a hundredth of the largest of all.
    least = 0.01 * max(np.abs(x).max() for x in jax.tree.leaves(plain_grads))

    def compare(ours, theirs):
        scale = max(np.abs(theirs).max(), least)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)

    jax.tree.map(compare, grads, plain_grads)


def test_remat_keeps_less():
    plain, dots, names, block = (gradient_of(how)[2] for how in ("plain", "dots", "names", "block"))
    assert block < names < dots < 0.8 * plain


def gradient_jaxpr(model, compute=REFERENCE):
    def loss(params, tokens):
        return apply(model, params, {"tokens": tokens}, compute).sum()

    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    return jax.make_jaxpr(jax.grad(loss))(abstract_params(model), tokens).jaxpr


def test_program_does_not_grow_with_depth():
    small, large = (
        len([*equations(gradient_jaxpr(make_model("modern", layers=n)))]) for n in (5, 25)
    )
    assert small == large
    # No two of these layers are alike.
    assert small < len(
        [*equations(gradient_jaxpr(make_model("modern", layers=5, windows=(2, 3, 4, 5))))]
    )


@pytest.mark.parametrize(
    "changes, unroll, wanted",
    [({}, 1, False), ({}, 0, True), (dict(layers=3, windows=(2, 0)), 1, True)],
)
def test_inline_remat_is_fenced(changes, unroll, wanted):
    """Without a fence the compiler would merge the recomputation with the first pass."""
    fences = [
        e.params["prevent_cse"]
        for e in equations(
            gradient_jaxpr(make_model(**changes), make_compute(remat="block", unroll=unroll))
        )
        if "prevent_cse" in e.params
    ]
    assert fences and (True in fences) == wanted
