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
