"""Every attention kernel against `reference`, and the reference against loops.

The choice of a kernel and the check of the choice are here too. Shapes: B batch, T query, N heads,
K kv heads, H head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model.attention import kernels
from gpt_jax.model.attention.attend import attend
from gpt_jax.model.attention.conformance import find_limit, measure_conformance
from gpt_jax.model.attention.kernels import (
    KERNELS,
    Kernel,
    Problem,
    choose_kernel,
)
from gpt_jax.model.attention.mask import Pattern, make_mask

B = 2
N = 4
K = 2
H = 8


def columns(length):
    """Segments, with padding, and blocks (prefix-LM, bidirectional) of two rows."""
    third = length // 3
    segment = np.array(
        [
            [1] * third + [2] * third + [3] * (length - 2 * third),
            [1] * third + [2] * (length - third),
        ]
    )
    ar = np.array([[0] * third + [1] * (length - third), [1] + [0] * (length - 1)])
    return segment, np.cumsum(ar, 1)


def patterns(length):
    segment, block = columns(length)
    window = length // 4 + 1
    return {
        "causal": Pattern(),
        "window": Pattern(window),
        "window of one": Pattern(1),
        "segments": Pattern(0, segment),
        "segments and window": Pattern(window, segment),
        "blocks": Pattern(0, None, block),
        "blocks, segments and window": Pattern(window, segment, block),
    }


def inputs(length, kv_heads=K):
    rng = np.random.default_rng(0)
    return [
        np.float32(rng.standard_normal((B, length, heads, H))) for heads in (N, kv_heads, kv_heads)
    ]


def test_mask_equals_the_loop():
    length = 12
    segment, block = columns(length)
    padded = np.where(np.arange(length) < 10, segment, 0)

    def is_allowed(pattern, b, t, s):
        order = s <= t if pattern.block is None else pattern.block[b, s] <= pattern.block[b, t]
        near = not pattern.window or t - s < pattern.window
        same = pattern.segment is None or pattern.segment[b, s] == pattern.segment[b, t] != 0
        return order and near and same

    for pattern in [*patterns(length).values(), Pattern(0, padded), Pattern(3, padded, block)]:
        plain = np.array(
            [is_allowed(pattern, *place) for place in np.ndindex(B, length, length)]
        ).reshape(B, length, length)
        jnp_pattern = Pattern(
            pattern.window, *(None if x is None else jnp.asarray(x) for x in pattern[1:])
        )
        np.testing.assert_array_equal(
            np.broadcast_to(make_mask(jnp_pattern, length), (B, length, length)), plain
        )


def test_attend_equals_numpy():
    """Grouped heads equal repeated ones. Soft-cap and dropout factors come where they belong."""
    length = 6
    q, k, v = inputs(length)
    mask = np.asarray(make_mask(Pattern(3), length))
    keep = np.random.default_rng(1).integers(0, 2, (B, N, length, length)) * 2.0

    def repeat(x):
        return np.repeat(x, N // K, axis=2).astype(np.float64)

    scores = np.einsum("btnh,bsnh->bnts", q, repeat(k)) / H**0.5
    scores = np.where(mask[:, None], 1.5 * np.tanh(scores / 1.5), -np.inf)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) * keep
    theirs = np.einsum("bnts,bsnh->btnh", probs, repeat(v))
    np.testing.assert_allclose(attend(q, k, v, mask, 1.5, jnp.float32(keep)), theirs, atol=1e-6)


def test_attend_on_a_row_without_keys_is_finite():
    q, k, v = inputs(6)
    mask = jnp.zeros((1, 6, 6), bool)
    value, grads = jax.value_and_grad(lambda *x: attend(*x, mask).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in (value, *grads))


# ---- kernels against reference -------------------------------------------------------------------


def both_ways(run, pattern, cap, args):
    """Output and gradients of a kernel, for a sum with fixed weights."""
    q, k, v = args
    weights = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def loss(q, k, v):
        y = run(q, k, v, pattern, cap, None)
        return (y * weights).sum(), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return y, *grads


def compare(run, length, names, caps=(0.0,), kv_heads=K, atol=1e-5):
    chosen = {(name, cap): patterns(length)[name] for name in names for cap in caps}

    @jax.jit
    def everything(args):
        return {
            key: [
                both_ways(kernel, pattern, key[1], args)
                for kernel in (run, KERNELS["reference"].run)
            ]
            for key, pattern in chosen.items()
        }

    for key, (ours, theirs) in everything(inputs(length, kv_heads)).items():
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(
                our, their, atol=atol * np.abs(their).max(), rtol=0, err_msg=str(key)
            )


@pytest.mark.parametrize("kv_heads", [N, K, 1])
def test_xla_equals_reference(kv_heads):
    compare(KERNELS["xla"].run, 12, patterns(12), kv_heads=kv_heads)


SPLASH = ("causal", "window", "segments", "segments and window")


@pytest.mark.parametrize("length", [64, 150])  # one block, and three of which the last is shorter
def test_blocked_equals_reference(length):
    compare(KERNELS["blocked"].run, length, SPLASH, (0.0, 2.0))


def test_blocked_drops_what_the_reference_drops():
    q, k, v = inputs(150)
    keep = jnp.float32(np.random.default_rng(1).integers(0, 2, (B, N, 150, 150)) * 2.0)
    ours, theirs = (
        KERNELS[name].run(q, k, v, Pattern(40), 0.0, keep) for name in ("blocked", "reference")
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "names, cap, kv_heads",
    [(SPLASH, 0.0, K), (("segments and window",), 2.0, N), (("causal",), 0.0, 1)],
)
def test_splash_equals_reference(names, cap, kv_heads):
    """The kernel's own code runs interpreted on a CPU, with the blocks that it skips."""
    compare(partial(kernels._splash, interpret=True), 256, names, (cap,), kv_heads, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize("window", [1, 3, 12])
def test_window_counts_the_query_itself(name, window):
    """All scores are equal, so the output at t is the mean of the last `window` values."""
    q, k, v = inputs(12, 1)
    y = KERNELS[name].run(0 * q, k, v, Pattern(window), 0.0, None)
    theirs = [v[:, max(0, t - window + 1) : t + 1, 0].mean(1) for t in range(12)]
    np.testing.assert_allclose(y[:, :, 0], np.stack(theirs, 1), atol=1e-6)


# ---- choice --------------------------------------------------------------------------------------


def problem(platform="cpu", **changes):
    plain = dict(
        platform=platform,
        dtype="bfloat16",
        head_dim=64,
        seq_len=1024,
        softcap=False,
        dropout=False,
        ar=False,
    )
    return Problem(**plain | changes)


@pytest.mark.parametrize(
    "name, posed, words",
    [
        ("cudnn", problem(), "needs a GPU, this is cpu"),
        ("splash", problem(), "needs a TPU, this is cpu"),
        ("splash", problem("gpu"), "needs a TPU"),
        ("cudnn", problem("tpu"), "needs a GPU"),
        ("xla", problem(softcap=True), "no soft-cap"),
        ("xla", problem(dropout=True), "no attention dropout"),
        ("cudnn", problem("gpu", dtype="float32"), "bfloat16"),
        ("cudnn", problem("gpu", head_dim=12), "divisible by 8"),
        ("cudnn", problem("gpu", softcap=True), "no soft-cap"),
        ("splash", problem("tpu", dropout=True), "dropout"),
        ("splash", problem("tpu", ar=True), "ar blocks"),
        ("blocked", problem(ar=True), "no ar blocks"),
        ("splash", problem("tpu", seq_len=100), "128"),
    ],
)
def test_a_named_kernel_runs_or_raises(name, posed, words):
    with pytest.raises(
        UsageError, match=rf"config\.compute\.kernel = '{name}': .*{words}.*; choose auto"
    ):
        choose_kernel(name, posed)


@pytest.mark.parametrize(
    "posed, wanted, words",
    [
        (problem(), "blocked", "fastest known on cpu"),
        (problem(ar=True), "reference", "blocked has no ar"),
        (problem("gpu"), "cudnn", "fastest known on gpu"),
        (problem("gpu", dtype="float32"), "flash", "cudnn needs"),
        (problem("gpu", softcap=True, head_dim=96), "reference", "xla has no soft"),
        (problem("tpu"), "splash", "fastest known on tpu"),
        (problem("tpu", seq_len=100), "xla", "splash needs seq_len"),
        (problem("tpu", dropout=True), "reference", "splash has no attention dropout"),
        (problem("strange"), "reference", "strange"),
    ],
)
def test_auto_says_why(posed, wanted, words):
    name, reason = choose_kernel("auto", posed)
    assert name == wanted and words in reason


def test_named_kernels_that_can_are_taken():
    for name in ("reference", "xla"):
        assert choose_kernel(name, problem()) == (name, "asked for")


# ---- conformance ---------------------------------------------------------------------------------

MODEL = config.resolve(
    config.Config(model=config.Model(embed=32, heads=4, kv_heads=2, windows=(5, 0), vocab=8))
).model


@pytest.mark.parametrize("name", ["reference", "blocked", "xla"])
@pytest.mark.parametrize("segments", [True, False])
def test_conformance_passes_a_good_kernel(name, segments, mesh):
    assert max(measure_conformance(name, MODEL, "float32", segments, rows=2)) < 1e-5
    with jax.set_mesh(mesh(2, 2, 2)):
        assert max(measure_conformance(name, MODEL, "float32", segments, rows=4)) < 1e-5


def test_a_process_measures_a_case_once(monkeypatch):
    """But a row of KERNELS that is another now is another case."""
    first = measure_conformance("blocked", MODEL, "float32", True, rows=2)
    assert measure_conformance("blocked", MODEL, "float32", True, rows=2) is first
    monkeypatch.setitem(KERNELS, "blocked", KERNELS["reference"])
    assert measure_conformance("blocked", MODEL, "float32", True, rows=2).values == 0


@pytest.mark.parametrize("name", ["reference", "blocked", "xla"])
def test_conformance_in_bfloat16(name):
    errors = measure_conformance(name, MODEL, "bfloat16", True, rows=2)
    assert max(errors) < find_limit("bfloat16", "cpu")


def test_a_ring_conforms(mesh):
    with jax.set_mesh(mesh(1, 2, 1, context=4)):
        assert max(measure_conformance("ring", MODEL, "float32", True, rows=2)) < 1e-5


def test_limits_follow_what_the_platform_multiplies_in():
    assert find_limit("float32", "cpu") == 1e-4 and find_limit("float32", "METAL") == 3e-2
    assert find_limit("float32", "gpu") == 1e-2 and find_limit("float32", "tpu") == 3e-2
    assert find_limit("bfloat16", "cpu") == find_limit("bfloat16", "gpu") == 3e-2
    with jax.default_matmul_precision("highest"):
        assert find_limit("float32", "gpu") == find_limit("float32", "tpu") == 1e-4


def sabotage(**changes):
    """The reference kernel, without one part of its pattern."""
    reference = KERNELS["reference"].run
    return Kernel(
        lambda q, k, v, pattern, *rest: reference(q, k, v, pattern._replace(**changes), *rest),
        lambda p: "",
    )


def leaky(q, k, v, pattern, cap, keep):
    """A kernel that lets the first document seep into the second.

    On values of ordinary size it is right to within any tolerance.
    """
    return KERNELS["reference"].run(q, k, v, pattern, cap, keep) + 1e-6 * v.mean(
        (1, 2), keepdims=True
    )


@jax.custom_vjp
def right_forwards(x):
    """The identity, whose gradient is nonsense."""
    return x


right_forwards.defvjp(lambda x: (x, None), lambda _, pull: (jnp.sin(1e3 * pull),))


def right_values(q, k, v, pattern, cap, keep):
    """A kernel with right values, and gradients of nothing."""
    return right_forwards(KERNELS["reference"].run(q, k, v, pattern, cap, keep))


def wrong_keys(q, k, v, pattern, cap, keep):
    """A kernel that forgets the gradient of its keys."""
    return KERNELS["reference"].run(q, jax.lax.stop_gradient(k), v, pattern, cap, keep)


@jax.custom_vjp
def seep(out, v):
    """Values without a leak, and a gradient that leaks."""
    return out


def seep_back(shape, pull):
    return pull, jnp.full(shape, 1e-9 * pull.mean(), pull.dtype)


seep.defvjp(lambda out, v: (out, v.shape), seep_back)


def leaky_backwards(q, k, v, pattern, cap, keep):
    return seep(KERNELS["reference"].run(q, k, v, pattern, cap, keep), v)


@pytest.mark.parametrize(
    "broken, words",
    [
        (Kernel(right_values, lambda p: ""), "differs from reference in its gradients"),
        (Kernel(wrong_keys, lambda p: ""), "differs from reference in its gradients"),
        (Kernel(leaky_backwards, lambda p: ""), "lets a document see the one before it"),
        (sabotage(segment=None), "differs from reference"),
        (sabotage(window=0), "differs from reference"),
        (sabotage(window=5), "differs from reference"),  # on the layer that sees everything
        (sabotage(block=jnp.zeros((1, 32), int)), "differs from reference"),
        (Kernel(lambda q, *rest: q * jnp.nan, lambda p: ""), "differs from reference"),
        (
            Kernel(
                lambda q, k, v, pattern, cap, keep: (
                    q * jnp.nan
                    if pattern.window
                    else KERNELS["reference"].run(q, k, v, pattern, cap, keep)
                ),
                lambda p: "",
            ),
            "differs from reference",
        ),
        (Kernel(leaky, lambda p: ""), "lets a document see the one before it"),
    ],
)
def test_conformance_refuses_a_broken_kernel(broken, words, monkeypatch):
    monkeypatch.setitem(KERNELS, "xla", broken._replace(check_length=32))
    with pytest.raises(UsageError, match=rf"config\.compute\.kernel = 'xla': {words}"):
        measure_conformance("xla", MODEL, "float32", segments=True, rows=2)


def test_what_a_kernel_cannot_do_is_refused_when_it_is_asked():
    """It is refused even if nobody asked `cannot` before.

    blocked would answer an ar pattern as if it were causal.
    """
    q = jnp.ones((1, 8, 2, 4))

    def run(name, **how):
        return kernels.attention(name, q, q, q, Pattern(block=how.pop("block", None)), **how)

    with pytest.raises(UsageError, match="'blocked': has no ar blocks"):
        run("blocked", block=jnp.zeros((1, 8), int))
    with pytest.raises(UsageError, match="'xla': has no soft-cap"):
        run("xla", cap=3.0)
    with pytest.raises(UsageError, match="'xla': has no attention dropout"):
        run("xla", keep=jnp.ones((1, 2, 8, 8)))
