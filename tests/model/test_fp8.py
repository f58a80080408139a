"""Matmuls in fp8: their numbers, their programs, and one answer on every mesh."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import ROWS, make_columns, make_config, put, run
from programs import list_matmuls, trace

from gpt_jax import config
from gpt_jax.model.layers import fp8
from gpt_jax.model.layers.linear import matmul
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.sharding import rows
from gpt_jax.sharding.mesh import make_mesh

NUMPY = {fp8.OPERAND: ml_dtypes.float8_e4m3fn, fp8.GRADIENT: ml_dtypes.float8_e5m2}
D, T, V = 32, 16, 64


def draw(*shape, dtype=jnp.bfloat16, seed=0):
    """Numbers of many magnitudes."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 6, shape)
    return jnp.asarray(values, dtype)


def quantize_in_numpy(x, dtype):
    """(the values in float8, the scale), in float64 but for the rounding."""
    x = np.asarray(x, np.float64)
    kind = NUMPY[dtype]
    limit = float(ml_dtypes.finfo(kind).max)
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / limit))
    return np.asarray(x / scale, np.float32).astype(kind), scale


# ---- numbers ----


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 3e-30, 2e20])
def test_quantizing_is_that_of_numpy(dtype, wide, factor):
    x = draw(64, 48, dtype=wide) * jnp.asarray(factor, wide)
    ours = jax.jit(fp8.quantize, static_argnums=1)(x, dtype)
    values, scale = quantize_in_numpy(x, dtype)
    assert ours.values.dtype == dtype and ours.scale.dtype == jnp.float32
    assert float(ours.scale) == scale
    assert np.asarray(ours.values).tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_the_largest_entry_just_fits(dtype):
    limit = float(jnp.finfo(dtype).max)
    for largest in (limit, limit * 1.001, limit / 2, 1.0, 2.0**-100):
        scale = float(fp8.find_scale(jnp.array([0.0, -largest], jnp.float32), limit))
        assert limit / 2 < largest / scale <= limit


def test_the_smallest_numbers_become_zeros_and_not_nan():
    for dtype in NUMPY:
        ours = fp8.quantize(jnp.array([1e-38, 2.0**-126, 0.0], jnp.float32), dtype)
        assert float(ours.scale) == 1.0
        assert np.asarray(ours.values, np.float32).tolist() == [0.0] * 3


def product(x, kernel):
    return matmul(x, kernel, None, multiplier="fp8")


def gradients(x, kernel, g):
    y, transpose = jax.vjp(product, x, kernel)
    return (y, *transpose(g))


def test_products_are_float32_sums_that_are_rounded_once():
    """To the bit: the sum of float8 products in float32, scaled, and rounded to bfloat16."""
    x, kernel, g = draw(2, 8, 512), draw(512, 24, seed=1), draw(2, 8, 24, seed=2)
    a, b = (quantize_in_numpy(array, fp8.OPERAND) for array in (x, kernel))
    c = quantize_in_numpy(g, fp8.GRADIENT)
    flat = [(value.reshape(-1, value.shape[-1]), scale) for value, scale in (a, b, c)]
    (a, sa), (b, sb), (c, sc) = ((np.float64(value), scale) for value, scale in flat)
    expected = (a @ b * sa * sb, c @ b.T * sc * sb, a.T @ c * sa * sc)

    for ours, exact in zip(jax.jit(gradients)(x, kernel, g), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        exact = exact.reshape(ours.shape)
        # Half a unit of bfloat16, and what float32 loses in a sum of terms that cancel.
        allowed = 2.0**-8 * np.abs(exact) + 1e-5 * np.abs(exact).max()
        assert (np.abs(np.float64(ours) - exact) <= allowed).all()


def test_a_long_sum_is_not_one_of_bfloat16():
    """A sum of ones in bfloat16 would end at 256."""
    ones = jnp.ones((1, 1, 4096), jnp.bfloat16)
    assert product(ones, jnp.ones((4096, 16), jnp.bfloat16))[0, 0].tolist() == [4096.0] * 16


def test_errors_are_those_of_fp8():
    """Products of normal draws are within a few percent, and not as near as in bfloat16."""
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 64, 512), (512, 64))
    )
    exact = np.float64(x[0]) @ np.float64(kernel)
    error = np.std(np.float64(product(x, kernel)[0]) - exact) / np.std(exact)
    assert 0.01 < error < 0.06


def test_zeros_give_zeros():
    x, kernel, g = draw(1, 8, 16), draw(16, 16), draw(1, 8, 16)
    for arrays in (
        (0 * x, kernel, g),
        (x, 0 * kernel, g),
        (x, kernel, 0 * g),
        (0 * x, 0 * kernel, 0 * g),
    ):
        results = gradients(*arrays)
        assert all(np.isfinite(np.float32(result)).all() for result in results)
    assert not np.float32(gradients(0 * x, kernel, g)[0]).any()
    assert not np.float32(gradients(x, kernel, 0 * g)[1]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad):
    """Everything is NaN, not the row alone: a scale belongs to the whole tensor."""
    x, kernel, g = draw(1, 8, 16), draw(16, 16), draw(1, 8, 16)
    y, _, to_kernel = gradients(x.at[0, 3, 5].set(bad), kernel, g)
    assert np.isnan(np.float32(y)).all() and np.isnan(np.float32(to_kernel)).all()
    _, to_x, to_kernel = gradients(x, kernel, g.at[0, 3, 5].set(bad))
    assert np.isnan(np.float32(to_x)).all() and np.isnan(np.float32(to_kernel)).all()


# ---- programs ----

MODELS = {
    "gpt2": {},
    "modern": dict(
        norm="plain_rmsnorm",
        pattern=(("attention", "swiglu"),),
        value_embed=True,
        value_embed_gate=4,
        smear=True,
        smear_gate=4,
        tied=False,
    ),
    "moe": dict(pattern=(("attention", "moe"),), experts=4, shared_experts=1, dispatch="capacity"),
}
# The linear maps in the body of the scan: q, k, v, out, and those of a (shared) feed-forward. The
# body of "modern" has two layers.
MAPS = {"gpt2": 6, "modern": 14, "moe": 7}
# How many matmuls fewer they are where q, k and v are joined, and up and gate.
JOINED = {"gpt2": 2, "modern": 6, "moe": 3}


def trace_gradient(name, **knobs):
    model = config.Model(layers=2, embed=D, heads=4, vocab=V, max_seq=T, mlp=48, **MODELS[name])
    model = config.resolve(config.Config(model=model)).model
    fields = dict(dtype="bfloat16", kernel="reference", matmul_dtype="fp8") | knobs
    module = Transformer(model, config.Compute(**fields))
    batch = {"tokens": jnp.zeros((2, T), jnp.int32)}

    def loss(params):
        logits, _ = module.apply({"params": params}, batch, method="features")
        head = module.apply({"params": params}, jnp.bfloat16, method="output")
        return module.apply({}, head, logits, method="logits").sum()

    return list_matmuls(trace(jax.grad(loss), abstract_params(model)))


def count_kinds(matmuls) -> Counter:
    return Counter(tuple(sorted(dtype for dtype, _ in operands)) for operands in matmuls)


FORWARD = ("float8_e4m3fn", "float8_e4m3fn")
BACKWARD = ("float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("name", MODELS)
def test_linear_maps_of_blocks_are_in_fp8_and_nothing_else(name):
    """Each has one matmul forward and two backward. The others stay as they are without fp8."""
    kinds = count_kinds(trace_gradient(name))
    plain = count_kinds(trace_gradient(name, matmul_dtype="compute"))
    assert kinds.pop(FORWARD) == MAPS[name]
    assert kinds.pop(BACKWARD) == 2 * MAPS[name]
    assert not [kind for kind in kinds if any("float8" in dtype for dtype in kind)]

    bfloat16 = ("bfloat16", "bfloat16")
    assert plain[bfloat16] - kinds[bfloat16] == 3 * (MAPS[name] - JOINED[name])
    assert {k: n for k, n in plain.items() if k != bfloat16} == {
        k: n for k, n in kinds.items() if k != bfloat16
    }


@pytest.mark.parametrize("remat, forward", [("none", 1), ("block", 2), ("dots", 1)])
def test_remat_runs_matmuls_again_as_it_says(remat, forward):
    kinds = count_kinds(trace_gradient("gpt2", remat=remat))
    # The last matmul of a block has a result that no gradient needs.
    assert kinds[FORWARD] in (forward * MAPS["gpt2"], forward * MAPS["gpt2"] - (forward - 1))
    assert kinds[BACKWARD] == 2 * MAPS["gpt2"]


# ---- meshes ----


def train(name, shape, **knobs):
    """The first loss and gradient, and the last loss, on a mesh or without one."""
    settings = make_config(name, matmul_dtype="fp8", **knobs)
    if not shape:
        sums, first, _ = run(name, make_columns(name), lambda p: p, settings)
        return sums, first
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        columns = rows.to_devices(mesh, make_columns(name), ROWS)
        sums, first, _ = run(name, columns, partial(put, mesh=mesh, model=settings.model), settings)
    return sums, first


@pytest.fixture(scope="module")
def alone():
    return train("gpt2", {})


@pytest.mark.parametrize(
    "shape, knobs",
    [
        (dict(data=2, fsdp=2, tensor=2), dict(remat="dots")),
        (dict(context=2, fsdp=2, tensor=2), dict(kernel="ring", shard_sequence=True)),
        (dict(pipeline=2, fsdp=2, tensor=2), dict(shard_sequence=True, remat="block")),
    ],
    ids=["data", "context", "pipeline"],
)
def test_mesh_equals_one_device(alone, shape, knobs):
    """Where a sum differs in its last bit, an entry may be rounded to its other neighbour.

    So the bound is that of a few such entries. A scale of a part of a tensor would pass it too: it
    differs by a power of two, which alone changes what underflows.
    """
    sums, first = train("gpt2", shape, **knobs)
    plain_sums, plain_first = alone
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain_first))
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(plain_first), strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=2e-3 * max(np.abs(theirs).max(), 1e-1 * largest)
        )
    for now, plain in zip(sums, plain_sums, strict=True):
        assert now["loss"] == pytest.approx(plain["loss"], rel=2e-4)


def test_one_scale_for_all_devices_and_nan_reaches_them():
    mesh = make_mesh(dict(fsdp=8))
    x = np.array(draw(16, 8, dtype=jnp.float32))
    x[13, 5] = 7000.0
    find = jax.jit(partial(fp8.find_scale, limit=448.0))
    with jax.set_mesh(mesh):
        scale = find(jax.device_put(x, P("fsdp")))
        assert (
            {float(shard.data) for shard in scale.addressable_shards} == {float(find(x))} == {16.0}
        )
        x[13, 5] = np.nan
        scale = find(jax.device_put(x, P("fsdp")))
        assert all(np.isnan(shard.data) for shard in scale.addressable_shards)


def test_inference_leaves_fp8_out_and_says_so():
    compute = config.Compute(dtype="bfloat16", matmul_dtype="fp8", remat="block")
    _, other = config.for_inference(config.Model(), compute)
    assert other == replace(compute, matmul_dtype="compute", remat="none")
    (line,) = config.describe_inference(compute)
    assert line.startswith("config.compute.matmul_dtype = 'fp8'") and "bfloat16" in line
    assert config.describe_inference(other) == []
