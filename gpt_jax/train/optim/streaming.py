"""An optimiser whose moments lie on the host, and pass through the device a few at a time.

The moments of one parameter do not meet those of another one, except where a rule mixes them, as
Muon does. The traced update therefore falls into parts that share no array of the host. Each part
fetches its arrays only when the part before it has stored its own, so the device never holds them
all.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax.extend import core

from gpt_jax import sharding


def keep_on_host(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its moments in the memory of the host, except while it updates. Run it under jit.

    Counters stay on the devices.
    """

    def update(updates, state, params=None):
        return _run_in_turn(fetch_and_update, updates, state, params)

    def fetch_and_update(updates, state, params):
        updates, state = tx.update(updates, sharding.to_device(state), params)
        return updates, sharding.to_host(state)

    return optax.GradientTransformation(lambda params: sharding.to_host(tx.init(params)), update)


def _run_in_turn(function, *trees):
    """`function(*trees)`, whose parts run one after another where they have arrays on the host."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*trees)
    jaxpr = closed.jaxpr
    parts = split(jaxpr)

    values: dict[Any, jax.Array] = dict(zip(jaxpr.invars, jax.tree.leaves(trees), strict=True))
    values |= zip(jaxpr.constvars, closed.consts, strict=True)
    stored: list[Any] = []  # What the part before left on the host.
    for part in parts:
        _wait(values, part.fetched, stored)
        _evaluate(jaxpr, part.equations, values)
        stored = part.stored

    results = [x.val if isinstance(x, core.Literal) else values[x] for x in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shape), results)


class Part(NamedTuple):
    """Equations that no other part's arrays on the host meet, in their order."""

    fetched: list  # The variables of the host that come in.
    equations: list
    stored: list  # The variables of the host that go out.


def split(jaxpr) -> list[Part]:
    """The parts of a jaxpr, first of all the one without arrays of the host."""
    fetched = [var for var in jaxpr.invars if _is_on_host(var)]
    owner: dict[Any, Any] = {var: var for var in fetched}  # A variable of the host for each one.

    def find(var):
        while owner[var] is not var:
            var = owner[var]
        return var

    origins = []
    for equation in jaxpr.eqns:
        met = [find(x) for x in equation.invars if not isinstance(x, core.Literal) and x in owner]
        for other in met[1:]:
            owner[find(other)] = find(met[0])
        if met:
            owner |= dict.fromkeys(equation.outvars, find(met[0]))
        origins.append(met[0] if met else None)

    parts: dict[Any, Part] = {None: Part([], [], [])}
    for var in fetched:
        parts.setdefault(find(var), Part([], [], [])).fetched.append(var)
    for origin, equation in zip(origins, jaxpr.eqns, strict=True):
        parts[None if origin is None else find(origin)].equations.append(equation)
    for var in jaxpr.outvars:
        if _is_on_host(var) and var in owner:
            parts[find(var)].stored.append(var)
    return [*parts.values()]


def _is_on_host(var) -> bool:
    return var.aval.memory_space == jax.memory.Space.Host


def _wait(values: dict, fetched: list, stored: list) -> None:
    """Lets the arrays `fetched` be read only after the arrays `stored` are written."""
    names = [*stored, *fetched]
    if stored and fetched:
        held = jax.lax.optimization_barrier([values[name] for name in names])
        values |= zip(names, held, strict=True)


def _evaluate(jaxpr, equations: list, values: dict) -> None:
    """Adds what the equations give to `values`."""
    made = [var for equation in equations for var in equation.outvars]
    inside = set(made)
    taken = {
        x: None
        for equation in equations
        for x in equation.invars
        if not isinstance(x, core.Literal) and x not in inside
    }
    part = jaxpr.replace(constvars=[], invars=[*taken], outvars=made, eqns=equations)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
    values |= zip(made, run(*[values[x] for x in taken]), strict=True)
