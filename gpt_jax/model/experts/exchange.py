"""Tokens to the experts that they chose and back, over the mesh axis expert (called by moe). What
is here runs on each device's own shard, all mesh axes manual.

Choices, and the index vectors `there` and `back`, are those of model/grouped.py. Shapes: n tokens
of this device, k choices of each, D embed, F mlp, E experts, p devices along the axis expert with E
/ p experts each, B rows of T tokens, C capacity.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.model.experts.local_experts import (
    Kernels,
    Placed,
    combine,
    feed_forward,
    first,
    hidden_of,
    in_places,
    pick,
    sort_choices,
    starts_of,
)

AXIS = "expert"


# ---- dropless ----


def dropless(
    x,
    choice,
    weight,
    kernels: Kernels,
    activation: Callable,
    devices: int,
    platform: str,
    kind: str,
):
    """Every choice computed: x [n, D], choice [n, k] in 0 … E (E: none), summed with weight [n, k]
    -> [n, D].

    With `devices` along the axis expert the choices go to their experts' owner, where they are
    grouped once more, and back. A device may be sent everything, so that its buffer has room for
    p * n * min(k, E / p) choices: nothing depends on how evenly tokens spread but the time."""
    (n, k), own = choice.shape, kernels.up.shape[0]
    flat = choice.ravel()
    if devices == 1:
        done = feed_forward(x, flat, k, kernels, activation, platform, flat.size)
        return combine(done.rows, weight, done.there, done.back)
    order, rank, sizes = sort_choices(flat, devices * own)
    sizes = jax.lax.all_gather(sizes, AXIS)  # [p, E]
    me, room = jax.lax.axis_index(AXIS), n * min(k, own)
    sent = sizes.reshape(devices, devices, own).sum(-1)  # [from, to]
    coming = jax.lax.dynamic_slice_in_dim(sizes, me * own, own, 1)  # [p, E / p]
    experts = (jnp.arange(room)[None, :, None] >= jnp.cumsum(coming, 1)[:, None]).sum(-1).ravel()
    trip = choose_exchange(kind)(Route(flat, order, rank, sent, me, own, room))
    done = feed_forward(trip.go(x, k), experts, 1, kernels, activation, platform, flat.size)
    home = trip.come_back(pick(done.rows, done.back, done.there, 1))
    return combine(home.rows, weight, home.there, home.back)


class Route(NamedTuple):
    """Which choices go where: choice [c] in 0 … E, its order and rank by expert, `sent` [p, p]
    choices from one device to another, this device `me`, `own` experts a device, `room` for what
    comes from one device."""

    choice: jax.Array
    order: jax.Array
    rank: jax.Array
    sent: jax.Array
    me: jax.Array
    own: int
    room: int


class Trip(NamedTuple):
    """go(x [n, D], k) -> [p * room, D], what comes from device i from place i * room on, zeros
    elsewhere; come_back([p * room, D]) -> Placed."""

    go: Callable
    come_back: Callable


def padded_exchange(route: Route) -> Trip:
    """`jax.lax.all_to_all` of as many places as may be needed: for devices that have no ragged
    exchange."""
    choice, order, rank, sent, me, own, room = route
    devices, starts = sent.shape[0], starts_of(sent[me])
    there = in_places(order, starts, sent[me], room)
    device = choice // own
    back = jnp.where(device < devices, device * room + rank - starts[device], there.size)
    trade = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    return Trip(
        lambda x, k: trade(pick(x, there, back, k)), lambda out: Placed(trade(out), there, back)
    )


def ragged(route: Route) -> Trip:
    """`jax.lax.ragged_all_to_all`: only what is there travels."""
    choice, order, rank, sent, me, own, room = route
    devices, none = sent.shape[0], choice.size
    starts, ends = starts_of(sent), jnp.arange(devices) * room
    there = jnp.where(jnp.arange(none) < sent[me].sum(), order, none)
    back = jnp.where(choice < devices * own, rank, none)
    trade = partial(jax.lax.ragged_all_to_all, axis_name=AXIS)

    def go(x, k):
        rows = pick(x, there, back, k)
        return trade(
            rows,
            jnp.zeros((devices * room, x.shape[1]), x.dtype),
            starts[me],
            sent[me],
            jnp.full(devices, me * room),
            sent[:, me],
        )

    def come_back(out):
        rows = trade(
            out,
            jnp.zeros((none, out.shape[1]), out.dtype),
            ends,
            sent[:, me],
            starts[:, me],
            sent[me],
        )
        return Placed(rows, there, back)

    return Trip(go, come_back)


# Kind of device -> function; ragged on all others. libtpu 0.0.42 refuses the ragged exchange on v5e
# beyond 16 chips ("not supported in limited ICI routing settings").
EXCHANGES = {"cpu": padded_exchange, "TPU v5 lite": padded_exchange, "TPU v5e": padded_exchange}


def choose_exchange(kind: str) -> Callable:
    """How choices travel between devices of a kind: `padded` or `ragged`."""
    return EXCHANGES.get(kind, ragged)


# ---- capacity ----


def capacity(tokens: int, experts: int, per_token: int, factor: float) -> int:
    """Choices that an expert takes from one row of `tokens`."""
    return max(
        1, min(tokens, math.ceil(round(tokens * per_token * factor / experts, 6)))
    )  # 55.000001 is 55


def limited(x, choice, weight, kernels: Kernels, activation: Callable, devices: int, room: int):
    """The first `room` choices of each expert in each row: x [B, T, D], choice [B, T, k] in 0 …
    E, summed with weight [B, T, k] -> [B, T, D], the others as zeros. A row is its own group, so
    that the result does not depend on the mesh."""
    (B, T, k), D, count = choice.shape, x.shape[2], devices * kernels.up.shape[0]

    def places(choice):
        order, rank, sizes = sort_choices(choice, count)
        starts = starts_of(sizes)
        there = in_places(order, starts, sizes, room)
        rank = rank - starts[choice]
        return there, jnp.where((choice < count) & (rank < room), choice * room + rank, there.size)

    there, back = jax.vmap(places)(choice.reshape(B, T * k))
    rows = jax.vmap(lambda *args: pick(*args, k))(x, there, back).reshape(B, count, room, D)
    rows = jnp.moveaxis(rows, 1, 0)  # [E, B, C, D]
    if devices > 1:
        rows = jax.lax.all_to_all(rows, AXIS, 0, 1, tiled=True)  # [E / p, p * B, C, D]
    shape = rows.shape
    rows, matmul = rows.reshape(shape[0], -1, D), partial(jnp.einsum, "end,edf->enf")
    hidden = hidden_of(activation, *(matmul(rows, kernel) for kernel in first(kernels)))
    out = matmul(hidden, kernels.down).reshape(shape)
    if devices > 1:
        out = jax.lax.all_to_all(out, AXIS, 1, 0, tiled=True)
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * room, D)
    return jax.vmap(combine)(out, weight, there, back)


def all_manual(fn: Callable, shape: tuple[int, ...], dtype) -> Callable:
    """`fn` of arrays, with a result of `shape`, run with all mesh axes manual. In the stages of
    a pipeline sharding.local traces it twice: with the axis pipeline left out, which what runs
    on single devices only (kernels, ragged collectives) refuses, and then for the stages, with
    it, which is what runs. The first gets NaN in its place: it would show."""
    mesh = jax.sharding.get_abstract_mesh()
    rest = () if mesh.empty else frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    return (lambda *args: jnp.full(shape, jnp.nan, dtype)) if rest else fn
