"""The transformer against a plain numpy one, and the properties that every variant must have.

Shapes: B batch, T sequence, D embed, N heads, H head_dim, V vocab.
"""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from plain_model import np_frequencies, np_row
from variants import (
    VARIANTS,
    T,
    V,
    apply,
    close,
    equations,
    logits_of,
    make_batch,
    make_compute,
    make_model,
    random_params,
)

from gpt_jax import config
from gpt_jax.config.knobs import BIASED, NORM_POSITIONS, QK_NORMS, ROPE_SCALINGS
from gpt_jax.config.layers import BIASED_PARTS, layer_specs
from gpt_jax.errors import UsageError
from gpt_jax.model.block import NORM_PLACES
from gpt_jax.model.count import count_params
from gpt_jax.model.layers.mlp import FFNS
from gpt_jax.model.layers.norms import NORMS
from gpt_jax.model.layers.positions import SCALINGS, rotary_frequencies
from gpt_jax.model.transformer import Transformer, abstract_params


def np_float64(params):
    return jax.tree.map(np.float64, params)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_numpy(name):
    model = make_model(name)
    batch = make_batch()
    params = np_float64(random_params(model))
    ours = logits_of(name)
    assert ours.dtype == np.float32

    def is_allowed(segment, t, s):
        return s <= t and segment[t] == segment[s] != 0

    for row in (0, 3, T + 1):
        segment = batch["segment"][row]
        allowed = partial(is_allowed, segment)
        theirs = np_row(model, params, batch["tokens"][row], batch["position"][row], allowed)
        close(ours[row, segment != 0], theirs[segment != 0])


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_reaches_back(name):
    """Token s changes logits at s, nothing before s, and nothing beyond the windows."""
    model = make_model(name)
    logits = logits_of(name)
    windows = [spec.window for spec in layer_specs(model)]
    reach = T if 0 in windows else sum(w - 1 for w in windows)
    for s in range(T):
        moved = np.abs(logits[s + 1] - logits[0]).max(-1)
        assert moved[s] > 1e-3
        assert (moved[:s] < 1e-6).all(), f"token {s} reaches back"
        assert (moved[s + reach + 1 :] < 1e-6).all(), f"token {s} reaches beyond the windows"


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_row_equals_documents_apart(name):
    logits = logits_of(name)
    close(logits[T + 1, :5], logits[T + 2, :5], 1e-6)
    close(logits[T + 1, 5:8], logits[T + 3, :3], 1e-6)


def test_variants_cover_every_row():
    """Every row of the tables is tested."""
    models = [make_model(name) for name in VARIANTS]

    assert {m.norm for m in models} == set(config.NORMS) == set(NORMS)
    assert {m.position for m in models} == set(config.POSITIONS)
    # Experts are tested in test_moe.py.
    assert {ffn for m in models for _, ffn in m.pattern} == set(config.DENSE_FFNS) == set(FFNS)
    assert {m.norm_position for m in models} == set(NORM_POSITIONS) == set(NORM_PLACES)
    assert {m.rope_scaling for m in models} == set(ROPE_SCALINGS) == set(SCALINGS)
    assert {m.qk_norm_over for m in models if m.qk_norm} == set(QK_NORMS)
    assert {m.biased for m in models} == set(BIASED) == set(BIASED_PARTS)
    assert {m.parallel for m in models} == {True, False}
    assert (
        {m.tied for m in models}
        == {m.qk_norm_after_rope for m in models if m.qk_norm}
        == {True, False}
    )


def test_ar_column_equals_explicit_mask():
    """Prefix-LM, bidirectional and causal rows are in one batch.

    A flag is one byte, and there are more tokens than a byte can count.
    """
    length = 264
    model = make_model(layers=1, position="sinusoidal", heads=2, embed=8)
    params = random_params(model)
    tokens = np.random.default_rng(2).integers(0, V, (3, length))
    prefixes = (100, length, 0)
    ar = np.array([[t >= p for t in range(length)] for p in prefixes]).astype(np.uint8)
    ours = jax.jit(lambda p, b: apply(model, p, b))(params, {"tokens": tokens, "ar": ar})

    def is_allowed(prefix, t, s):
        return s <= t or (s < prefix and t < prefix)

    for row, prefix in enumerate(prefixes):
        allowed = partial(is_allowed, prefix)
        close(ours[row], np_row(model, np_float64(params), tokens[row], np.arange(length), allowed))


def test_rotary_frequencies_equal_the_loop_over_wavelengths():
    for name in ("llama3", "neox", "gemma2", "gemma3"):
        model = make_model(name)
        np.testing.assert_allclose(rotary_frequencies(model), np_frequencies(model), rtol=1e-6)

    gemma = make_model("gemma3")
    local = rotary_frequencies(gemma, is_local=True)
    np.testing.assert_allclose(local, np_frequencies(gemma, is_local=True), rtol=1e-6)
    assert (local != rotary_frequencies(gemma)).all()

    scaled, plain = (
        rotary_frequencies(make_model("llama3", rope_scale_factor=f)) for f in (8.0, 1.0)
    )
    kept = scaled == plain
    between = (scaled < plain) & (scaled > plain / 8)
    divided = np.isclose(scaled, plain / 8)

    # The three bands of the scaling are all seen.
    assert kept.any() and between.any() and divided.any()


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_bfloat16_compute_keeps_float32_parameters_and_logits(name):
    model = make_model(name)
    compute = make_compute(dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(model))} == {"float32"}

    trace = jax.make_jaxpr(lambda p, b: apply(model, p, b, compute))(
        random_params(model), make_batch()
    )
    assert trace.out_avals[0].dtype == jnp.float32

    products = [e for e in equations(trace.jaxpr) if e.primitive.name == "dot_general"]
    assert {v.aval.dtype.name for e in products for v in e.invars} == {"bfloat16"}

    outputs = {e.outvars[0].aval.dtype.name for e in products if e.outvars[0].aval.shape[-1] == V}
    roots = [e for e in equations(trace.jaxpr) if e.primitive.name == "rsqrt"]
    # Logits and norms are float32.
    assert outputs == {"float32"} and {e.outvars[0].aval.dtype.name for e in roots} == {"float32"}

    softmaxes = [
        e
        for e in equations(trace.jaxpr)
        if e.primitive.name == "exp" and e.outvars[0].aval.ndim == 5
    ]
    assert softmaxes and {e.outvars[0].aval.dtype.name for e in softmaxes} == {"float32"}

    ours = jax.jit(lambda p, b: apply(model, p, b, compute))(random_params(model), make_batch())[0]
    close(ours, logits_of(name)[0], 0.06)


GOLDEN = """
backout/scale 1
blocks/0/attention/k/kernel 2,16,16
blocks/0/attention/out/kernel 2,16,16
blocks/0/attention/q/kernel 2,16,16
blocks/0/attention/v/kernel 2,16,16
blocks/0/attention/value_embed/table 2,29,16
blocks/0/attention/value_gate/kernel 2,3,4
blocks/0/mlp/down/kernel 2,64,16
blocks/0/mlp/up/kernel 2,16,64
blocks/1/attention/k/kernel 2,16,16
blocks/1/attention/out/kernel 2,16,16
blocks/1/attention/q/kernel 2,16,16
blocks/1/attention/v/kernel 2,16,16
blocks/1/mlp/down/kernel 2,64,16
blocks/1/mlp/up/kernel 2,16,64
embed/table 29,16
head/kernel 16,29
residual/x 5
residual/x0 5
smear/factor/scale 1
smear/gate/kernel 5,1
tail/0/attention/k/kernel 16,16
tail/0/attention/out/kernel 16,16
tail/0/attention/q/kernel 16,16
tail/0/attention/v/kernel 16,16
tail/0/attention/value_embed/table 29,16
tail/0/attention/value_gate/kernel 3,4
tail/0/mlp/down/kernel 64,16
tail/0/mlp/up/kernel 16,64
"""
GPT2_PATHS = """
blocks/0/attention/k/bias 3,16
blocks/0/attention/k/kernel 3,16,16
blocks/0/attention/out/bias 3,16
blocks/0/attention/out/kernel 3,16,16
blocks/0/attention/q/bias 3,16
blocks/0/attention/q/kernel 3,16,16
blocks/0/attention/v/bias 3,16
blocks/0/attention/v/kernel 3,16,16
blocks/0/mixer_norm/bias 3,16
blocks/0/mixer_norm/scale 3,16
blocks/0/mlp/down/bias 3,16
blocks/0/mlp/down/kernel 3,64,16
blocks/0/mlp/up/bias 3,64
blocks/0/mlp/up/kernel 3,16,64
blocks/0/mlp_norm/bias 3,16
blocks/0/mlp_norm/scale 3,16
embed/table 29,16
final_norm/bias 16
final_norm/scale 16
position/table 10,16
"""


@pytest.mark.parametrize("name, golden", [("modern", GOLDEN), ("gpt2", GPT2_PATHS)])
@pytest.mark.parametrize("unroll", [1, 0])
def test_parameter_paths_are_api(name, golden, unroll):
    model = Transformer(make_model(name), make_compute(unroll=unroll))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    made = jax.eval_shape(model.init, jax.random.key(0), {"tokens": tokens})["params"]
    leaves = jax.tree_util.tree_leaves_with_path(made)
    found = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {','.join(map(str, leaf.shape))}"
        for path, leaf in leaves
    ]
    assert sorted(found) == golden.split("\n")[1:-1]


def test_count_params():
    assert count_params(make_model("gpt2")) == {
        "total": 3 * (4 * (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16 + 4 * 16) + 29 * 16 + 10 * 16 + 32,
        "embedding": 29 * 16 + 10 * 16,
        "matmul": 3 * (4 * 16 * 16 + 2 * 16 * 64) + 29 * 16,
    }
    modern = count_params(make_model("modern"))
    assert (
        modern["embedding"] == 4 * 29 * 16
        and modern["total"] == modern["embedding"] + modern["matmul"] + 10 + 2
    )


def test_context_beyond_the_position_table_is_refused():
    model = make_model(max_seq=T - 1)
    with pytest.raises(UsageError, match=f"{T} tokens do not fit the model's context of {T - 1}"):
        jax.eval_shape(lambda p, b: apply(model, p, b), random_params(model), make_batch())
