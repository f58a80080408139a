"""The transformer against a plain numpy one, and the properties that every variant must have.

Parameters are drawn at random from the abstract tree, so that nothing starts at zero and no
initialiser is compiled. Shapes: B batch, T sequence, D embed, N heads, H head_dim, V vocab.
"""

import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from plain_model import np_frequencies, np_layer, np_row

from gpt_jax import config
from gpt_jax.config.layers import LayerSpec, layer_specs, layout
from gpt_jax.errors import UsageError
from gpt_jax.model.count import count_params
from gpt_jax.model.layers.extras import dropout
from gpt_jax.model.layers.mlp import FFNS
from gpt_jax.model.layers.norms import NORMS
from gpt_jax.model.layers.positions import rotary_frequencies
from gpt_jax.model.parametrization import make_init, residual_ramp
from gpt_jax.model.transformer import REFERENCE, Transformer, abstract_params, init_params

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
}


def make_compute(**changes) -> config.Compute:
    return config.Compute(kernel="reference", **changes)


def make_model(name="gpt2", **changes) -> config.Model:
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
    return Transformer(model, compute).apply({"params": params}, batch, **more)


@cache
def logits_of(name):
    model = make_model(name)
    return np.asarray(jax.jit(lambda p, b: apply(model, p, b))(random_params(model), make_batch()))


def np_float64(params):
    return jax.tree.map(np.float64, params)


def close(ours, theirs, rel=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())


# ---- every variant -------------------------------------------------------------------------------


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
    assert {m.norm_position for m in models} == {"pre", "post"}
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
    for name in ("llama3", "neox", "gemma2"):
        np.testing.assert_allclose(
            rotary_frequencies(make_model(name)), np_frequencies(make_model(name)), rtol=1e-6
        )
    scaled, plain = (
        rotary_frequencies(make_model("llama3", rope_scale_factor=f)) for f in (8.0, 1.0)
    )
    kept = scaled == plain
    between = (scaled < plain) & (scaled > plain / 8)
    divided = np.isclose(scaled, plain / 8)

    # The three bands of the scaling are all seen.
    assert kept.any() and between.any() and divided.any()


# ---- depth: layout, scan, remat ------------------------------------------------------------------


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


def equations(jaxpr):
    """Every equation of a jaxpr and of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


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


# ---- dropout -------------------------------------------------------------------------------------


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


# ---- dtypes, paths, initialisation ---------------------------------------------------------------


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


@pytest.mark.parametrize(
    "init, role, std",
    [
        ("gpt2", "qkv", 0.02),
        ("gpt2", "embed", 0.02),
        ("gpt2", "mlp_out", 0.02 / math.sqrt(6)),
        ("gpt2", "attention_out", 0.02 / math.sqrt(6)),
        ("xavier", "mlp_in", math.sqrt(2 / 384)),
        ("xavier", "embed", 1 / 8),
        ("modern", "embed", 0.8),
        ("modern", "head", 0.001),
        ("modern", "qkv", 1 / 8),
        ("modern", "mlp_in", 0.4 / 8),
        ("modern", "attention_out", 0.0),
        ("modern", "mlp_out", 0.0),
        ("modern", "gate", 0.0),
    ],
)
def test_spread_of_fresh_weights(init, role, std):
    weights = make_init(role, make_model(init=init, embed=64))(
        jax.random.key(0), (128, 256), jnp.float32
    )
    assert (
        float(weights.std()) == pytest.approx(std, rel=0.02)
        and abs(float(weights.mean())) <= 0.02 * std
    )


# ---- test_model.py


@pytest.mark.parametrize(
    "init, wanted",
    [
        (
            "gpt2",
            {
                "embed/table": 0.02,
                "q/kernel": 0.02,
                "up/kernel": 0.02,
                "out/kernel": 0.02 / 2,
                "down/kernel": 0.02 / 2,
                "value_embed/table": 0.02,
                "head/kernel": 0.02,
            },
        ),
        (
            "modern",
            {
                "embed/table": 0.8,
                "q/kernel": 1 / 8,
                "up/kernel": 0.4 / 8,
                "out/kernel": 0,
                "down/kernel": 0,
                "value_embed/table": 1 / 8,
                "value_gate/kernel": 0,
                "head/kernel": 0.001,
            },
        ),
    ],
)
def test_fresh_weights_are_spread_by_their_role(init, wanted):
    """Residual projections are small or zero. Embedding and head have a spread of their own."""
    model = make_model("modern", layers=2, embed=64, vocab=128, windows=(0,), init=init)
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    )
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(x.std()) for path, x in leaves
    }
    for end, std in wanted.items():
        ours = [value for path, value in found.items() if f"/{path}".endswith(f"/{end}")]
        assert ours == pytest.approx([std] * len(ours), rel=0.05) and ours, end


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


def test_fresh_layers_differ_and_ramps_run_over_depth():
    model = make_model("modern", layers=4, windows=(0,), value_embed=False)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    first, second = params["blocks"]["0"]["attention"]["q"]["kernel"][:2]
    assert (first != second).mean() > 0.99
    np.testing.assert_allclose(
        params["residual"]["x"], [1.15, 1.15 - 1 / 30, 1.05 + 1 / 30, 1.05], rtol=1e-6
    )
    np.testing.assert_allclose(residual_ramp(0.2, 0.05)(None, (3,)), [0.2, 0.125, 0.05], rtol=1e-6)


def test_context_beyond_the_position_table_is_refused():
    model = make_model(max_seq=T - 1)
    with pytest.raises(UsageError, match=f"{T} tokens do not fit the model's context of {T - 1}"):
        jax.eval_shape(lambda p, b: apply(model, p, b), random_params(model), make_batch())
