"""Sends tokens to the experts that they chose and back, over the mesh axis expert.

The functions run on each device's own shard, and all mesh axes are manual. Choices and the index
vectors `there` and `back` are explained in local_experts.py.

Shapes: n tokens of this device, k choices of each, p devices along the axis expert. B rows of T
tokens, D embed, F mlp, E experts, of which a device has E / p, C capacity.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config
from gpt_jax.model.experts.local_experts import (
    Kernels,
    Placed,
    combine,
    compute_hidden,
    feed_forward,
    first_kernels,
    multiply_by_expert,
    pick,
    sort_choices,
    spread_to_places,
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
    habits: config.Habits,
):
    """Computes every choice: x [n, D] and choice [n, k], summed with weight [n, k] -> [n, D].

    Choices are experts 0 … E - 1, and E stands for none.

    With `devices` along the axis expert, choices travel to the owner of their expert and back. The
    owner groups them once more. A device may be sent everything, so its buffer has room for
    p * n * min(k, E / p) choices. Only the time depends on how evenly tokens spread.
    """
    n, k = choice.shape
    own = kernels.up.shape[0]
    flat = choice.ravel()
    if devices == 1:
        done = feed_forward(x, flat, k, kernels, activation, habits, flat.size)
        rows = checkpoint_name(done.rows, "experts_out")
        return combine(rows, weight, done.there, done.back)

    order, rank, sizes = sort_choices(flat, devices * own)
    sizes = jax.lax.all_gather(sizes, AXIS)  # [p, E]
    me = jax.lax.axis_index(AXIS)
    room = n * min(k, own)
    sent = sizes.reshape(devices, devices, own).sum(-1)  # [from, to]

    # The choices of a device arrive sorted by expert, and their numbers tell where experts change.
    coming = jax.lax.dynamic_slice_in_dim(sizes, me * own, own, 1)  # [p, E / p]
    experts = (jnp.arange(room)[None, :, None] >= jnp.cumsum(coming, 1)[:, None]).sum(-1).ravel()

    trip = choose_exchange(habits)(Route(flat, order, rank, sent, me, own, room))
    done = feed_forward(trip.go(x, k), experts, 1, kernels, activation, habits, flat.size)
    home = trip.come_back(pick(done.rows, done.back, done.there, 1))
    rows = checkpoint_name(home.rows, "experts_out")
    return combine(rows, weight, home.there, home.back)


class Route(NamedTuple):
    """Which choices go where.

    `choice` [c] are experts 0 … E, with their `order` and `rank` by expert. `sent` [p, p] counts
    the choices that go from one device to another. `me` is the number of this device, which has
    `own` experts. `room` is the number of places for what comes from one device.
    """

    choice: jax.Array
    order: jax.Array
    rank: jax.Array
    sent: jax.Array
    me: jax.Array
    own: int
    room: int


class Trip(NamedTuple):
    """Both ways of an exchange.

    go(x [n, D], k) gives [p * room, D]. What comes from device i begins at place i * room, and
    zeros fill the other places. come_back([p * room, D]) gives Placed.
    """

    go: Callable
    come_back: Callable


def padded_exchange(route: Route) -> Trip:
    """Exchanges as many places as may be needed, by `jax.lax.all_to_all`.

    This is for devices that have no ragged exchange.
    """
    choice, order, rank, sent, me, own, room = route
    devices = sent.shape[0]
    starts = starts_of(sent[me])
    there = spread_to_places(order, starts, sent[me], room)
    device = choice // own
    back = jnp.where(device < devices, device * room + rank - starts[device], there.size)
    trade = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)

    def go(x, k):
        return trade(pick(x, there, back, k))

    def come_back(out):
        return Placed(trade(out), there, back)

    return Trip(go, come_back)


def ragged_exchange(route: Route) -> Trip:
    """Exchanges only the choices that exist, by `jax.lax.ragged_all_to_all`."""
    choice, order, rank, sent, me, own, room = route
    devices = sent.shape[0]
    none = choice.size
    starts = starts_of(sent)
    ends = jnp.arange(devices) * room
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


def choose_exchange(habits: config.Habits) -> Callable:
    """Chooses how choices travel between devices."""
    return ragged_exchange if habits.ragged_exchange else padded_exchange


# ---- capacity ----


def capacity(tokens: int, experts: int, per_token: int, factor: float) -> int:
    """Computes how many choices an expert takes from one row of `tokens`."""
    # The rounding makes 55.000001, an error of floating point, 55 and not 56.
    share = round(tokens * per_token * factor / experts, 6)
    return max(1, min(tokens, math.ceil(share)))


def limited(x, choice, weight, kernels: Kernels, activation: Callable, devices: int, room: int):
    """Computes the first `room` choices of each expert in each row, and leaves out the others.

    x [B, T, D] and choice [B, T, k], summed with weight [B, T, k] -> [B, T, D]. Choices are
    experts 0 … E - 1, and E stands for none. A row is its own group, so that the result does not
    depend on the mesh.
    """
    B, T, k = choice.shape
    D = x.shape[2]
    experts = devices * kernels.up.shape[0]

    def find_places(choice):
        order, rank, sizes = sort_choices(choice, experts)
        starts = starts_of(sizes)
        there = spread_to_places(order, starts, sizes, room)
        rank = rank - starts[choice]
        is_taken = (choice < experts) & (rank < room)
        return there, jnp.where(is_taken, choice * room + rank, there.size)

    def pick_row(x, there, back):
        return pick(x, there, back, k)

    there, back = jax.vmap(find_places)(choice.reshape(B, T * k))
    rows = jax.vmap(pick_row)(x, there, back).reshape(B, experts, room, D)
    rows = jnp.moveaxis(rows, 1, 0)  # [E, B, C, D]
    if devices > 1:
        rows = jax.lax.all_to_all(rows, AXIS, 0, 1, tiled=True)  # [E / p, p * B, C, D]

    shape = rows.shape
    rows = checkpoint_name(rows.reshape(shape[0], -1, D), "experts_in")
    hidden = compute_hidden(
        activation, *(multiply_by_expert(rows, kernel) for kernel in first_kernels(kernels))
    )
    out = multiply_by_expert(hidden, kernels.down).reshape(shape)

    if devices > 1:
        out = jax.lax.all_to_all(out, AXIS, 1, 0, tiled=True)
    out = jnp.moveaxis(out, 0, 1).reshape(B, experts * room, D)
    out = checkpoint_name(out, "experts_out")
    return jax.vmap(combine)(out, weight, there, back)


def all_manual(fn: Callable, shape: tuple[int, ...], dtype) -> Callable:
    """Returns `fn` where all mesh axes are manual, and elsewhere a stand-in that gives NaN.

    `fn` takes arrays and gives a result of `shape`.

    The stand-in is for the stages of a pipeline, where `sharding.run_local` traces a function
    twice. The first trace leaves out the axis pipeline. Kernels and ragged collectives refuse it,
    because they run on single devices only. The second trace has the axis, and is the one that
    runs. If the first ever ran, the NaN would show it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not frozenset(mesh.axis_names) - frozenset(mesh.manual_axes):
        return fn

    def stand_in(*args):
        return jnp.full(shape, jnp.nan, dtype)

    return stand_in
