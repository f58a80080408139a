"""What the program of a gradient is made of: the dtypes of its matmuls, and what it runs twice.

Programs are read as JAX traces them, so neither an accelerator nor a compiler is needed.
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import ROWS, make_columns, make_config, put, random_params
from programs import list_equations, list_matmuls, list_reductions, trace

from gpt_jax import config, sharding
from gpt_jax.model.attention import kernels
from gpt_jax.model.layers.linear import matmul
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.run.parts import make_network
from gpt_jax.sharding import layout, rows
from gpt_jax.sharding.mesh import make_mesh
from gpt_jax.train.step import gradients

B, T, D, V = 2, 128, 32, 48
NARROW = jnp.bfloat16
MODELS = {
    "gpt2": {},
    "llama": dict(norm="rmsnorm", position="rotary", tied=False, kv_heads=2, bias=False),
    "modern": dict(
        norm="plain_rmsnorm",
        position="rotary",
        pattern=(("attention", "relu2"),),
        qk_norm=True,
        value_embed=True,
        value_embed_gate=4,
        smear=True,
        smear_gate=4,
        backout=True,
        residual_scalars=True,
        logit_softcap=15.0,
    ),
    "moe": dict(pattern=(("attention", "moe"),), experts=4, dispatch="capacity"),
}


def trace_gradient(name: str, remat: str = "none", kernel: str = "xla"):
    model = config.Model(layers=2, embed=D, heads=4, vocab=V, max_seq=T, **MODELS[name])
    model = config.resolve(config.Config(model=model)).model
    compute = config.Compute(dtype="bfloat16", kernel=kernel, remat=remat)
    module = Transformer(model, compute)
    batch = {"tokens": jnp.zeros((B, T), jnp.int32)}

    def loss(params):
        hidden, _ = module.apply({"params": params}, batch, method="features")
        head = module.apply({"params": params}, NARROW, method="output")
        return module.apply({}, head, hidden, method="logits").sum()

    return trace(jax.grad(loss), abstract_params(model))


@pytest.mark.parametrize("name", MODELS)
def test_matmuls_multiply_in_the_compute_dtype(name):
    """Forward and backward, the head among them. Routers alone decide in float32."""
    matmuls = list_matmuls(trace_gradient(name, kernel="reference"))
    assert len(matmuls) >= 20
    wide = [operands for operands in matmuls if any(dtype == "float32" for dtype, _ in operands)]
    experts = 4
    assert [
        operands for operands in wide if not any(experts in shape for _, shape in operands)
    ] == []
    assert bool(wide) == (name == "moe")


def count_kernels(remat: str) -> int:
    """How often a kernel stands in the program of a gradient."""
    equations = trace_gradient("llama", remat, "splash")
    return Counter(equation.primitive.name for equation in equations)["pallas_call"]


def test_kept_matmuls_keep_the_attention_kernels_result():
    """The kernel runs forward once, as without remat. Under `block` it runs twice."""
    assert count_kernels("dots") == count_kernels("none") > 0
    assert count_kernels("block") == count_kernels("none") + 1


def test_a_policy_keeps_what_cudnn_gives():
    class Primitive:
        def __init__(self, name):
            self.name = name

    assert kernels.is_kernel_result(Primitive("dot_product_attention_fwd_wrapper"))
    assert not kernels.is_kernel_result(Primitive("dot_product_attention_bwd"))
    assert not kernels.is_kernel_result(Primitive("dot_general"))


def test_sums_stay_wide_and_gradients_are_those_of_float32():
    """The rounded gradient is within bfloat16 of the one in float32."""
    rng = np.random.default_rng(0)
    x, kernel, g = (
        jnp.asarray(rng.standard_normal(shape), NARROW) for shape in ((4, 8), (8, 6), (4, 6))
    )

    def gradient(dtype):
        def loss(x, kernel):
            y = matmul(x[None], kernel, None, jnp.float32)[0]
            assert y.dtype == jnp.float32
            return (y * g.astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1))(x.astype(dtype), kernel.astype(dtype))

    for ours, exact in zip(gradient(NARROW), gradient(jnp.float32), strict=True):
        assert ours.dtype == NARROW
        np.testing.assert_allclose(np.float32(ours), exact, rtol=2e-2, atol=2e-2)


# ---- sums over devices ---------------------------------------------------------------------------

RING = dict(kernel="ring")
SEQ = dict(shard_sequence=True)
CUT = [  # model, mesh, knobs
    ("gpt2", dict(data=8), {}),
    ("modern", dict(fsdp=8), dict(loss_chunk=4)),
    ("gpt2", dict(data=2, fsdp=2, tensor=2), SEQ | dict(loss_chunk=4)),
    ("gpt2", dict(context=2, fsdp=2, data=2), RING | dict(remat="dots")),
    ("moe", dict(expert=2, fsdp=2, data=2), dict(accumulate=2)),
    ("bias", dict(expert=2, fsdp=4), {}),  # It has a capacity.
    ("moe", dict(pipeline=2, expert=2, fsdp=2), dict(remat="block")),
    ("gpt2", dict(data=2, fsdp=4), dict(zero=1)),
    ("gpt2", dict(data=2, fsdp=4), dict(matmul_dtype="fp8")),
]
NARROWS = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def make_gradient(name, mesh, **knobs):
    """(function of parameters and columns that gives the gradient, both of them) on a mesh."""
    settings = make_config(name, **knobs)
    network = make_network(settings.model, settings.compute)
    params = put(random_params(name), mesh, settings.model)
    if settings.mesh.zero == 1:
        params = layout.gather_fsdp(params)

    def find_gradient(params, columns):
        key = jax.random.key(0)
        return gradients(network, params, {}, columns, key, settings.train)[0]

    return find_gradient, params, rows.to_devices(mesh, make_columns(name), ROWS)


@pytest.mark.parametrize("reduce_dtype", ["compute", "float32"])
@pytest.mark.parametrize("name, shape, knobs", CUT)
def test_devices_sum_gradients_of_weights_in_the_dtype_that_was_asked_for(
    name, shape, knobs, reduce_dtype
):
    """In any case weights travel in bfloat16 and matmuls multiply it, or numbers of 8 bits.

    Streams are summed over tensor in bfloat16, too.
    """
    mesh = make_mesh(shape)
    dtypes = dict(dtype="bfloat16", reduce_dtype=reduce_dtype)
    with jax.set_mesh(mesh):
        equations = trace(*make_gradient(name, mesh, **knobs, **dtypes))

    summed = [row for row in list_reductions(equations, mesh) if row[2] != ("tensor",)]
    narrow = [row for row in summed if row[0] == "bfloat16"]
    assert bool(narrow) == (reduce_dtype == "compute")
    assert len(summed) > 10

    experts = make_config(name).model.experts
    for operands in list_matmuls(equations):
        is_router = any(experts in shape for _, shape in operands) and name != "gpt2"
        assert is_router or {dtype for dtype, _ in operands} <= NARROWS
    gathers = [x for x in equations if x.primitive.name.startswith("all_gather")]
    wide = [x for x in gathers if x.invars[0].aval.dtype == jnp.float32]
    assert all(_is_table_or_router(x.invars[0].aval.shape, name) for x in wide), wide


def _is_table_or_router(shape, name) -> bool:
    """Whether a weight is looked up or multiplied in float32 in any case."""
    model = make_config(name).model
    return bool({model.vocab, model.max_seq, model.experts or -1} & set(shape))


@pytest.mark.parametrize("shape", [dict(data=8), dict(fsdp=8), dict(data=2, context=2, tensor=2)])
def test_sums_in_float32_are_nearer_to_the_exact_ones(shape):
    """Eight devices round their parts of a kernel's gradient to 8 bits, or do not round them."""
    mesh = make_mesh(shape)
    axes = ("embed", "mlp")
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((16, 16, width)).astype(NARROW) for width in (32, 48))
    exact = np.einsum("btd,btf->df", np.float64(x), np.float64(g))

    def find_error(reduce_dtype):
        compute = config.Compute(dtype="bfloat16", reduce_dtype=reduce_dtype)

        def loss(kernel, x, g):
            used = sharding.use_weight(kernel, axes, NARROW, compute.gradient_dtype)
            y = matmul(sharding.constrain(x, "batch", "seq", None), used, "mlp")
            return (y * sharding.constrain(g, "batch", "seq", "mlp")).astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            stored = NamedSharding(mesh, sharding.make_spec(sharding.STORED, axes))
            kernel = jax.device_put(np.zeros((32, 48), np.float32), stored)
            gradient = jax.jit(jax.grad(loss))(kernel, x, g)
        assert gradient.sharding == stored
        return np.abs(gradient - exact).max() / np.abs(exact).max()

    assert find_error("float32") < 1e-6
    assert find_error("compute") > 1e-3


# ---- sums once an update -------------------------------------------------------------------------

WHOLE = [  # model, mesh, knobs
    ("gpt2", dict(data=8), {}),
    ("moe", dict(data=2, tensor=2), dict(loss_chunk=4)),
    ("modern", dict(data=2, fsdp=2), dict(zero=1)),
]


def list_looped_reductions(equations, mesh, count):
    """What devices sum in loops of `count` turns over microbatches, other than streams."""
    loops = [x for x in equations if x.primitive.name == "scan" and x.params["length"] == count]
    inside = [inner for loop in loops for inner in list_equations(loop.params["jaxpr"].jaxpr)]
    return [row for row in list_reductions(inside, mesh) if row[2] != ("tensor",)]


@pytest.mark.parametrize("name, shape, knobs", WHOLE)
def test_gradients_of_microbatches_are_summed_over_devices_once(name, shape, knobs):
    """No loop over microbatches sends anything, and the gradient is that of the other way."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    results = []
    for once in (False, True):
        with jax.set_mesh(mesh):
            made = make_gradient(name, mesh, accumulate=2, reduce_once=once, **knobs)
            looped = list_looped_reductions(trace(*made), mesh, 2)
            assert bool(looped) != once
            results.append(jax.tree.map(np.asarray, jax.jit(made[0])(*made[1:])))

    each, once = results
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(each))
    for ours, theirs in zip(jax.tree.leaves(once), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * largest)
