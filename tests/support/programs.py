"""Reads programs as JAX traces them: their equations, and the operands of their matmuls."""

from collections.abc import Iterator

import jax
from jax.interpreters import partial_eval


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
