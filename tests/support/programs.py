"""Reads programs as JAX traces them: their equations, and the operands of their matmuls."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from gpt_jax import config
from gpt_jax.model.transformer import Transformer, abstract_params


def list_equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from list_equations(inner)


def trace(function, *arguments):
    """The equations of a function, without those whose results nobody uses."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(list_equations(used))


def list_matmuls(equations) -> list[tuple]:
    """(operands, shapes) of every matmul."""
    return [
        tuple((x.aval.dtype.name, x.aval.shape) for x in equation.invars)
        for equation in equations
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general")
    ]


def trace_layers(model: config.Model, compute: config.Compute, rows: int = 2) -> list:
    """The equations of the gradient of a resolved model's layers, without its head."""
    module = Transformer(model, compute)
    batch = {"tokens": jnp.zeros((rows, model.max_seq), jnp.int32)}

    def loss(params):
        hidden, _ = module.apply({"params": params}, batch, method="features")
        return hidden.astype(jnp.float32).sum()

    return trace(jax.grad(loss), abstract_params(model))


def count_left_bytes(equations, layers: int) -> dict[str, int]:
    """{memory: bytes} of the arrays that a scan over `layers` layers leaves for the backward pass.

    They are in the compute dtype bfloat16, or float32 sums of softmax.
    """
    scans = [e for e in equations if e.primitive.name == "scan"]
    forward = next(scan for scan in scans if scan.params["length"] == layers)
    left = {"device": 0, "host": 0}
    for var in forward.outvars[forward.params["num_carry"] :]:
        is_on_host = var.aval.memory_space == jax.memory.Space.Host
        left["host" if is_on_host else "device"] += var.aval.size * var.aval.dtype.itemsize
    return left
