"""Tokens to the experts that they chose and back (called by moe): grouped matmuls, and the exchange over the mesh axis
expert. What is here runs on each device's own shard, all mesh axes manual.

A *choice* is one token at one expert: token t makes choices t * k … t * k + k - 1. Choices are moved by two index
vectors that are each other's inverse: `there` (which choice stands at a place) and `back` (at which place a choice
stands); an index beyond the end means none. Shapes: n tokens of this device, k choices of each, D embed, F mlp, E
experts, p devices along the axis expert with E / p experts each, B rows of T tokens, C capacity.
"""

import math
from functools import partial
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

AXIS = "expert"


class Kernels(NamedTuple):
    """This device's experts: down [E / p, F, D], up and gate [E / p, D, F]."""

    down: jax.Array
    up: jax.Array
    gate: jax.Array | None = None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def pick(x, there, back, fan):
    """Row there[i] // fan of x [n, D] at place i -> [places, D], zeros for none. `back` [n * fan] makes the backward
    pass a lookup too, where the transpose of a lookup is a scatter, which no accelerator likes."""
    return jnp.take(x, there // fan, axis=0, mode="fill", fill_value=0)


def _pick_backward(fan, back, g):
    return combine(g, jnp.ones((back.size // fan, fan), jnp.float32), None, back), None, None


pick.defvjp(lambda x, there, back, fan: (pick(x, there, back, fan), back), _pick_backward)


@jax.custom_vjp
def combine(rows, weight, there, back):
    """The choices of each token, from their places in rows [places, D], summed in float32 with weight [n, k] -> [n, D];
    `there` and `back` as in `pick`. One choice of all tokens after the other: an array [n, k, D] of float32 would be the
    largest that there is, and a TPU pads its k to 8."""
    return sum(_column(rows, back, weight.shape, j) * weight[:, j, None]
               for j in range(weight.shape[1])).astype(rows.dtype)


def _column(rows, back, shape, j):
    return jnp.take(rows, back.reshape(shape)[:, j], axis=0, mode="fill", fill_value=0).astype(jnp.float32)


def _combine_backward(saved, g):
    rows, weight, there, back = saved
    fan = weight.shape[1]
    scale = jnp.take(weight.ravel(), there, mode="fill", fill_value=0)[:, None]
    to_rows = jnp.take(g, there // fan, axis=0, mode="fill", fill_value=0) * scale
    to_weight = [(_column(rows, back, weight.shape, j) * g).sum(-1) for j in range(fan)]
    return to_rows.astype(rows.dtype), jnp.stack(to_weight, -1), None, None


combine.defvjp(lambda *args: (combine(*args), args), _combine_backward)


class Placed(NamedTuple):
    """What experts made of choices: rows [places, D], and the two index vectors."""

    rows: jax.Array
    there: jax.Array
    back: jax.Array


def _sort(experts: jax.Array, count: int):
    """(order, rank, sizes) of choices [c] by expert, earlier ones first; an expert of `count` stands for none."""
    order = jnp.argsort(experts, stable=True)
    sizes = (experts[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
    return order, jnp.argsort(order), sizes


def _starts(sizes):
    return jnp.cumsum(sizes, axis=-1) - sizes


def feed_forward(x, experts, fan: int, kernels: Kernels, activation: Callable, platform: str, likely: int) -> Placed:
    """x [n, D] through this device's `experts` [n * fan], a row for each choice and zeros for none. `likely`: choices that are there when tokens spread evenly."""
    return WAYS.get(platform, by_blocks)(x, experts, fan, kernels, activation, likely)


def hidden_of(activation: Callable, up, gate=None):
    """What goes into the last matmul, from what the first ones give."""
    return activation(up) if gate is None else activation(gate) * up


def first(kernels: Kernels) -> tuple:
    """The kernels that rows meet first."""
    return kernels[1:] if kernels.gate is not None else (kernels.up,)


# ---- sorted: TPUs ----

TILE = 128  # rows of a matrix unit's tile


def by_sorting(x, experts, fan: int, kernels: Kernels, activation: Callable, likely: int):
    """Choices sorted by expert and `jax.lax.ragged_dot`, for which the TPU compiler has kernels."""
    order, rank, sizes = _sort(experts, kernels.up.shape[0])
    places = -(-experts.size // TILE) * TILE
    there = jnp.where(jnp.arange(places) < sizes.sum(), jnp.pad(order, (0, places - order.size)), experts.size)
    back = jnp.where(experts < kernels.up.shape[0], rank, places)
    rows = pick(x, there, back, fan)
    hidden = hidden_of(activation, *(ragged_dot(rows, kernel, sizes) for kernel in first(kernels)))
    return Placed(ragged_dot(hidden, kernels.down, sizes), there, back)


@jax.custom_vjp
def ragged_dot(rows, kernel, sizes):
    """`jax.lax.ragged_dot` whose kernels' gradient is megablox's tgmm: libtpu 0.0.42 has kernels for the rest, but
    multiplies all rows for every expert there."""
    return jax.lax.ragged_dot(rows, kernel, sizes)


def _ragged_dot_backward(saved, g):
    rows, kernel, sizes = saved
    back, = jax.linear_transpose(lambda rows: jax.lax.ragged_dot(rows, kernel, sizes), rows)(g)
    return back, kernel_gradient(rows, g, sizes, kernel.dtype), None


ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), _ragged_dot_backward)


def kernel_gradient(rows, g, sizes, dtype, interpret: bool = False):
    """Sum of rows[i]^T g[i] over each group: [m, in], [m, out] -> [groups, in, out]. m is a multiple of TILE."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
    tile = next(size for size in (512, 256, TILE) if rows.shape[0] % size == 0)
    tiling = (tile, *(min(1024, x.shape[1]) for x in (rows, g)))
    return tgmm(rows.T, g, sizes, dtype, tiling, interpret=interpret)


# ---- blocks: GPUs and CPUs ----

def by_blocks(x, experts, fan: int, kernels: Kernels, activation: Callable, likely: int):
    """Each expert's choices padded to whole blocks (MegaBlocks, Gale et al. 2022, arXiv:2211.15841), and one block at a
    time through its expert: on GPUs and CPUs XLA's `ragged_dot` multiplies every row with every expert."""
    count = kernels.up.shape[0]
    order, rank, sizes = _sort(experts, count)
    size = block_rows(likely, count)
    blocks = -(-sizes // size)
    number, before, starts = experts.size // size + count, _starts(blocks), _starts(sizes)
    owner = (jnp.arange(number)[:, None] >= jnp.cumsum(blocks)).sum(-1).clip(0, count - 1)
    place = (jnp.arange(number) - before[owner])[:, None] * size + jnp.arange(size)
    there = jnp.where(place < sizes[owner][:, None], jnp.take(order, starts[owner][:, None] + place, mode="clip"),
                      experts.size).ravel()
    back = jnp.where(experts < count, before[experts] * size + rank - starts[experts], there.size)
    out = through_blocks(activation, pick(x, there, back, fan), kernels, owner, blocks.sum())
    return Placed(out, there, back)


def block_rows(choices: int, experts: int) -> int:
    """Rows of a block: a power of two, by which an eighth of the rows and less are padding where `choices` spread
    evenly."""
    return 2**min(10, max(3, (choices // experts // 4).bit_length() - 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def through_blocks(activation, rows, kernels: Kernels, owner, count):
    """rows [blocks * size, D], block b through expert owner[b], for the first `count` blocks; zeros for the others, on
    which no time is spent. Only one block's hidden values live at a time: the backward pass makes them anew."""

    def step(i, out):
        own = _own(kernels, owner[i])
        return _put(out, i, hidden_of(activation, *(_block(rows, owner, i) @ kernel for kernel in first(own))) @ own.down)

    return jax.lax.fori_loop(0, count, step, jnp.zeros_like(rows))


def _through_blocks_backward(activation, saved, g):
    rows, kernels, owner, count = saved
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def step(i, carry):
        back, sums = carry
        own, row, out = _own(kernels, owner[i]), _block(rows, owner, i), _block(g, owner, i)
        hidden, transpose = jax.vjp(partial(hidden_of, activation), *(row @ kernel for kernel in first(own)))
        inner = transpose(out @ own.down.T)
        parts = product(hidden.T, out), *(product(row.T, part) for part in inner)
        back = _put(back, i, sum(product(part, kernel.T) for part, kernel in zip(inner, first(own))).astype(rows.dtype))
        return back, Kernels(*(made.at[owner[i]].add(part) for made, part in zip(sums, parts)))

    sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), kernels)
    back, sums = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(rows), sums))
    return back, jax.tree.map(lambda made, kernel: made.astype(kernel.dtype), sums, kernels), None, None


def _own(kernels: Kernels, expert) -> Kernels:
    return jax.tree.map(lambda kernel: kernel[expert], kernels)


def _block(rows, owner, i):
    size = rows.shape[0] // owner.size
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def _put(rows, i, block):
    return jax.lax.dynamic_update_slice_in_dim(rows, block, i * block.shape[0], 0)


through_blocks.defvjp(lambda *args: (through_blocks(*args), args[1:]), _through_blocks_backward)
WAYS = {"tpu": by_sorting}  # platform -> function; by_blocks on all others


# ---- dropless ----

def dropless(x, choice, weight, kernels: Kernels, activation: Callable, devices: int, platform: str, kind: str):
    """Every choice computed: x [n, D], choice [n, k] in 0 … E (E: none), summed with weight [n, k] -> [n, D].

    With `devices` along the axis expert the choices go to their experts' owner, where they are grouped once more, and
    back. A device may be sent everything, so that its buffer has room for p * n * min(k, E / p) choices: nothing
    depends on how evenly tokens spread but the time."""
    (n, k), own = choice.shape, kernels.up.shape[0]
    flat = choice.ravel()
    if devices == 1:
        done = feed_forward(x, flat, k, kernels, activation, platform, flat.size)
        return combine(done.rows, weight, done.there, done.back)
    order, rank, sizes = _sort(flat, devices * own)
    sizes = jax.lax.all_gather(sizes, AXIS)  # [p, E]
    me, room = jax.lax.axis_index(AXIS), n * min(k, own)
    sent = sizes.reshape(devices, devices, own).sum(-1)  # [from, to]
    coming = jax.lax.dynamic_slice_in_dim(sizes, me * own, own, 1)  # [p, E / p]
    experts = (jnp.arange(room)[None, :, None] >= jnp.cumsum(coming, 1)[:, None]).sum(-1).ravel()
    trip = exchange(kind)(Route(flat, order, rank, sent, me, own, room))
    done = feed_forward(trip.go(x, k), experts, 1, kernels, activation, platform, flat.size)
    home = trip.come_back(pick(done.rows, done.back, done.there, 1))
    return combine(home.rows, weight, home.there, home.back)


class Route(NamedTuple):
    """Which choices go where: choice [c] in 0 … E, its order and rank by expert, `sent` [p, p] choices from one device
    to another, this device `me`, `own` experts a device, `room` for what comes from one device."""

    choice: jax.Array
    order: jax.Array
    rank: jax.Array
    sent: jax.Array
    me: jax.Array
    own: int
    room: int


class Trip(NamedTuple):
    """go(x [n, D], k) -> [p * room, D], what comes from device i from place i * room on, zeros elsewhere;
    come_back([p * room, D]) -> Placed."""

    go: Callable
    come_back: Callable


def padded(route: Route) -> Trip:
    """`jax.lax.all_to_all` of as many places as may be needed: for devices that have no ragged exchange."""
    choice, order, rank, sent, me, own, room = route
    devices, none = sent.shape[0], choice.size
    starts, place = _starts(sent[me]), jnp.arange(room)
    there = jnp.where(place < sent[me][:, None], jnp.take(order, starts[:, None] + place, mode="clip"), none).ravel()
    device = choice // own
    back = jnp.where(device < devices, device * room + rank - starts[device], there.size)
    trade = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    return Trip(lambda x, k: trade(pick(x, there, back, k)), lambda out: Placed(trade(out), there, back))


def ragged(route: Route) -> Trip:
    """`jax.lax.ragged_all_to_all`: only what is there travels."""
    choice, order, rank, sent, me, own, room = route
    devices, none = sent.shape[0], choice.size
    starts, ends = _starts(sent), jnp.arange(devices) * room
    there = jnp.where(jnp.arange(none) < sent[me].sum(), order, none)
    back = jnp.where(choice < devices * own, rank, none)
    trade = partial(jax.lax.ragged_all_to_all, axis_name=AXIS)

    def go(x, k):
        rows = pick(x, there, back, k)
        return trade(rows, jnp.zeros((devices * room, x.shape[1]), x.dtype), starts[me], sent[me],
                     jnp.full(devices, me * room), sent[:, me])

    def come_back(out):
        rows = trade(out, jnp.zeros((none, out.shape[1]), out.dtype), ends, sent[:, me], starts[:, me], sent[me])
        return Placed(rows, there, back)

    return Trip(go, come_back)


# Kind of device -> function; ragged on all others. libtpu 0.0.42 refuses the ragged exchange on v5e beyond 16 chips
# ("not supported in limited ICI routing settings").
EXCHANGES = {"cpu": padded, "TPU v5 lite": padded, "TPU v5e": padded}


def exchange(kind: str) -> Callable:
    """How choices travel between devices of a kind: `padded` or `ragged`."""
    return EXCHANGES.get(kind, ragged)


# ---- capacity ----

def capacity(tokens: int, experts: int, per_token: int, factor: float) -> int:
    """Choices that an expert takes from one row of `tokens`."""
    return max(1, min(tokens, math.ceil(round(tokens * per_token * factor / experts, 6))))  # 55.000001 is 55


def limited(x, choice, weight, kernels: Kernels, activation: Callable, devices: int, room: int):
    """The first `room` choices of each expert in each row: x [B, T, D], choice [B, T, k] in 0 … E, summed with weight
    [B, T, k] -> [B, T, D], the others as zeros. A row is its own group, so that the result does not depend on the mesh."""
    (B, T, k), D, count = choice.shape, x.shape[2], devices * kernels.up.shape[0]

    def places(choice):
        order, rank, sizes = _sort(choice, count)
        starts, place = _starts(sizes), jnp.arange(room)
        there = jnp.where(place < sizes[:, None], jnp.take(order, starts[:, None] + place, mode="clip"), choice.size)
        rank = rank - starts[choice]
        return there.ravel(), jnp.where((choice < count) & (rank < room), choice * room + rank, there.size)

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
    """`fn` of arrays, with a result of `shape`, run with all mesh axes manual. In the stages of a pipeline sharding.local
    traces it twice: with the axis pipeline left out, which what runs on single devices only (kernels, ragged collectives)
    refuses, and then for the stages, with it, which is what runs. The first gets NaN in its place: it would show."""
    mesh = jax.sharding.get_abstract_mesh()
    rest = () if mesh.empty else frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    return (lambda *args: jnp.full(shape, jnp.nan, dtype)) if rest else fn
