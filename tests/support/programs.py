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


REDUCTIONS = ("psum", "psum_invariant", "reduce_scatter", "unreduced_reduce_scatter")


def list_reductions(equations, mesh) -> list[tuple]:
    """(dtype, shape, mesh axes) of all that devices sum, over axes of `mesh` longer than 1.

    The sums are collectives, matmuls and sums along dims that are cut, and moves of what each
    device has its own part of.
    """
    found = []
    for equation in equations:
        axes = {name for name in _list_summed_axes(equation) if mesh.shape[name] > 1}
        if axes:
            result = equation.invars[0] if equation.primitive.name == "reshard" else None
            for x in [result] if result is not None else equation.outvars:
                found.append((x.aval.dtype.name, x.aval.shape, tuple(sorted(axes))))
    return found


def _list_summed_axes(equation) -> set[str]:
    name = equation.primitive.name
    if name in REDUCTIONS:
        axes = equation.params.get("axes", equation.params.get("axis_name"))
        return {axes} if isinstance(axes, str) else set(axes)
    if name == "reshard":
        before, after = (
            equation.invars[0].aval.sharding.spec,
            equation.outvars[0].aval.sharding.spec,
        )
        return set(before.unreduced) - set(after.unreduced)
    if name == "dot_general":
        (left, _), _ = equation.params["dimension_numbers"]
        dims = left
    elif name == "reduce_sum":
        dims = equation.params["axes"]
    else:
        return set()

    spec = equation.invars[0].aval.sharding.spec
    parts = [spec[dim] for dim in dims]
    cut = {axis for part in parts for axis in ([part] if isinstance(part, str) else part or ())}
    return cut - set(equation.outvars[0].aval.sharding.spec.unreduced)
