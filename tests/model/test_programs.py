"""What the program of a gradient is made of: the dtypes of its matmuls, and what it runs twice.

Programs are read as JAX traces them, so neither an accelerator nor a compiler is needed.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import list_matmuls, trace

from gpt_jax import config
from gpt_jax.model.attention import kernels
from gpt_jax.model.layers.linear import matmul
from gpt_jax.model.transformer import Transformer, abstract_params

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
