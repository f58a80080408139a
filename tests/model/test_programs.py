"""What the program of a gradient is made of: the dtypes of its matmuls, and what it runs twice.

Programs are read as JAX traces them, so neither an accelerator nor a compiler is needed.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import config
from gpt_jax.model.attention import kernels
from gpt_jax.model.attention.mask import Pattern
from gpt_jax.model.layers.linear import matmul
from gpt_jax.model.transformer import Transformer, abstract_params, is_kept

B, T, D, V = 2, 128, 32, 48
NARROW = jnp.bfloat16
MODELS = {
    "gpt2": dict(),
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


def list_equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from list_equations(inner)


def trace(function, *arguments):
    return list(list_equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def list_matmuls(equations) -> list[tuple]:
    """(operands, shapes) of every matmul."""
    return [
        tuple((x.aval.dtype.name, x.aval.shape) for x in equation.invars)
        for equation in equations
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general")
    ]


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
    assert len(matmuls) > 20
    wide = [operands for operands in matmuls if any(dtype == "float32" for dtype, _ in operands)]
    experts = 4
    assert [
        operands for operands in wide if not any(experts in shape for _, shape in operands)
    ] == []
    assert bool(wide) == (name == "moe")
