"""Choices through this device's own experts (called by experts).

A *choice* is one token at one expert: token t makes choices t * k … t * k + k - 1. Choices are
moved by two index vectors that are each other's inverse: `there` (which choice stands at a place)
and `back` (at which place a choice stands); an index beyond the end means none. Shapes: n tokens of
this device, k choices of each, D embed, F mlp, E experts in all, of which this device has E / p.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernels(NamedTuple):
    """This device's experts: down [E / p, F, D], up and gate [E / p, D, F]."""

    down: jax.Array
    up: jax.Array
    gate: jax.Array | None = None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def pick(x, there, back, fan):
    """Row there[i] // fan of x [n, D] at place i -> [places, D], zeros for none. `back` [n *
    fan] makes the backward pass a lookup too, where the transpose of a lookup is a scatter,
    which no accelerator likes."""
    return jnp.take(x, there // fan, axis=0, mode="fill", fill_value=0)


def _pick_backward(fan, back, g):
    return combine(g, jnp.ones((back.size // fan, fan), jnp.float32), None, back), None, None


pick.defvjp(lambda x, there, back, fan: (pick(x, there, back, fan), back), _pick_backward)


@jax.custom_vjp
def combine(rows, weight, there, back):
    """The choices of each token, from their places in rows [places, D], summed in float32 with
    weight [n, k] -> [n, D]; `there` and `back` as in `pick`. One choice of all tokens after the
    other: an array [n, k, D] of float32 would be the largest that there is, and a TPU pads its k
    to 8."""
    return sum(
        _column(rows, back, weight.shape, j) * weight[:, j, None] for j in range(weight.shape[1])
    ).astype(rows.dtype)


def _column(rows, back, shape, j):
    return jnp.take(rows, back.reshape(shape)[:, j], axis=0, mode="fill", fill_value=0).astype(
        jnp.float32
    )


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


def sort_choices(experts: jax.Array, count: int):
    """(order, rank, sizes) of choices [c] by expert, earlier ones first; an expert of `count`
    stands for none."""
    order = jnp.argsort(experts, stable=True)
    sizes = (experts[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
    return order, jnp.argsort(order), sizes


def starts_of(sizes):
    """Where groups of these `sizes` begin, one after the other."""
    return jnp.cumsum(sizes, axis=-1) - sizes


def in_places(order, starts, sizes, width: int):
    """Choices of groups, each from `starts` [groups] on in `order` and `sizes` many, at `width`
    fixed places each -> [groups * width], order.size for none."""
    place = jnp.arange(width)
    choice = jnp.take(order, starts[:, None] + place, mode="clip")
    return jnp.where(place < sizes[:, None], choice, order.size).ravel()


def feed_forward(
    x, experts, fan: int, kernels: Kernels, activation: Callable, platform: str, likely: int
) -> Placed:
    """x [n, D] through the `experts` [n * fan] of each choice, zeros for none: an expert of E /
    p. `likely`: choices that are there when tokens spread evenly."""
    return EXPERT_WAYS.get(platform, by_blocks)(
        x, experts, fan, kernels, activation, platform, likely
    )


def hidden_of(activation: Callable, up, gate=None):
    """What goes into the last matmul, from what the first ones give."""
    return activation(up) if gate is None else activation(gate) * up


def first(kernels: Kernels) -> tuple:
    """The kernels that rows meet first."""
    return kernels[1:] if kernels.gate is not None else (kernels.up,)


# ---- sorted: TPUs ----

TILE = 128  # rows of a matrix unit's tile


def by_sorting(
    x, experts, fan: int, kernels: Kernels, activation: Callable, platform: str, likely: int
):
    """Choices sorted by expert and `jax.lax.ragged_dot`, for which the TPU compiler has kernels."""
    order, rank, sizes = sort_choices(experts, kernels.up.shape[0])
    places = -(-experts.size // TILE) * TILE
    there = jnp.where(
        jnp.arange(places) < sizes.sum(), jnp.pad(order, (0, places - order.size)), experts.size
    )
    back = jnp.where(experts < kernels.up.shape[0], rank, places)
    rows = pick(x, there, back, fan)
    hidden = hidden_of(activation, *(ragged_dot(rows, kernel, sizes) for kernel in first(kernels)))
    return Placed(ragged_dot(hidden, kernels.down, sizes), there, back)


@jax.custom_vjp
def ragged_dot(rows, kernel, sizes):
    """`jax.lax.ragged_dot` whose kernels' gradient is megablox's tgmm: libtpu 0.0.42 has kernels
    for the rest, but multiplies all rows for every expert there."""
    return jax.lax.ragged_dot(rows, kernel, sizes)


def _ragged_dot_backward(saved, g):
    rows, kernel, sizes = saved
    (back,) = jax.linear_transpose(lambda rows: jax.lax.ragged_dot(rows, kernel, sizes), rows)(g)
    return back, kernel_gradient(rows, g, sizes, kernel.dtype), None


ragged_dot.defvjp(lambda *args: (ragged_dot(*args), args), _ragged_dot_backward)


def kernel_gradient(rows, g, sizes, dtype, interpret: bool = False):
    """Sum of rows[i]^T g[i] over each group: [m, in], [m, out] -> [groups, in, out]. m is a
    multiple of TILE."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile = next(size for size in (512, 256, TILE) if rows.shape[0] % size == 0)
    tiling = (tile, *(min(1024, x.shape[1]) for x in (rows, g)))
    return tgmm(rows.T, g, sizes, dtype, tiling, interpret=interpret)


# ---- blocks: GPUs and CPUs ----

# Rows whose matmuls, forward and backward, take as long as reading and writing the float32 sums of
# an expert's gradients: 24 bytes a weight against 22 FLOPs a weight and row. GPU: by the data
# sheets of H100 and H200, at 0.75 of the peak (not measured); CPU: by 20 GB/s and 150 GFLOP/s.
SUM_ROWS = {"gpu": 200, "cpu": 8}


def by_blocks(
    x, experts, fan: int, kernels: Kernels, activation: Callable, platform: str, likely: int
):
    """Each expert's choices padded to whole blocks (MegaBlocks, Gale et al. 2022,
    arXiv:2211.15841), and one block at a time through its expert: on GPUs and CPUs XLA's
    `ragged_dot` multiplies every row with every expert."""
    count = kernels.up.shape[0]
    order, rank, sizes = sort_choices(experts, count)
    size = choose_block_rows(likely, count, platform)
    blocks = -(-sizes // size)
    number, before, starts = experts.size // size + count, starts_of(blocks), starts_of(sizes)
    owner = (jnp.arange(number)[:, None] >= jnp.cumsum(blocks)).sum(-1).clip(0, count - 1)
    passed = (jnp.arange(number) - before[owner]) * size
    there = in_places(order, starts[owner] + passed, sizes[owner] - passed, size)
    back = jnp.where(experts < count, before[experts] * size + rank - starts[experts], there.size)
    return Placed(
        through_blocks(activation, size, pick(x, there, back, fan), kernels, blocks), there, back
    )


def choose_block_rows(choices: int, experts: int, platform: str) -> int:
    """Rows of a block: a power of two, where half a block of padding for each expert costs about
    as much time as adding gradients once a block; at most what an expert gets where `choices`
    spread evenly, at least 8."""
    rows = max(1, choices // experts)
    best = round(math.log2(2 * SUM_ROWS[platform] * rows) / 2)
    return 2 ** max(3, min(best, rows.bit_length() - 1))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def through_blocks(activation, size: int, rows, kernels: Kernels, blocks):
    """rows [places, D], `size` at a time: the first blocks[0] blocks through expert 0, the next
    blocks[1] through expert 1, …; zeros for the rest, on which no time is spent. Only one
    block's hidden values live at a time: the backward pass makes them anew. Expert by expert, so
    that its weights are looked up once, and its gradients are summed in float32 in place, with
    nothing else but the matmul that adds to them (an index there costs copies of all of them a
    block)."""

    def expert(e, out):
        own = _own(kernels, e)

        def step(i, out):
            row = _block(rows, size, i)
            return _put(
                out, i, hidden_of(activation, *(row @ kernel for kernel in first(own))) @ own.down
            )

        return jax.lax.fori_loop(ends[e] - blocks[e], ends[e], step, out)

    ends = jnp.cumsum(blocks)
    return jax.lax.fori_loop(0, blocks.size, expert, jnp.zeros_like(rows))


def _through_blocks_backward(activation, size, saved, g):
    rows, kernels, blocks = saved
    ends, product = jnp.cumsum(blocks), partial(jnp.matmul, preferred_element_type=jnp.float32)

    def expert(e, carry):
        own = _own(kernels, e)

        def step(i, carry):
            back, sums = carry
            row, out = _block(rows, size, i), _block(g, size, i)
            hidden, transpose = jax.vjp(
                partial(hidden_of, activation), *(row @ kernel for kernel in first(own))
            )
            inner = transpose(out @ own.down.T)
            parts = product(hidden.T, out), *(product(row.T, part) for part in inner)
            to_row = sum(product(part, kernel.T) for part, kernel in zip(inner, first(own)))
            return _put(back, i, to_row.astype(rows.dtype)), Kernels(*map(jnp.add, sums, parts))

        back, grads = carry
        sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), own)
        back, sums = jax.lax.fori_loop(ends[e] - blocks[e], ends[e], step, (back, sums))

        def put(grad, made):
            return jax.lax.dynamic_update_index_in_dim(grad, made.astype(grad.dtype), e, 0)

        return back, jax.tree.map(put, grads, sums)

    back, grads = jax.lax.fori_loop(
        0, blocks.size, expert, (jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, kernels))
    )
    return back, grads, None


def _own(kernels: Kernels, expert) -> Kernels:
    return jax.tree.map(
        lambda kernel: jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False), kernels
    )


def _block(rows, size, i):
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def _put(rows, i, block):
    return jax.lax.dynamic_update_slice_in_dim(rows, block, i * block.shape[0], 0)


through_blocks.defvjp(lambda *args: (through_blocks(*args), args[2:]), _through_blocks_backward)
EXPERT_WAYS = {"tpu": by_sorting}  # platform -> function; by_blocks on all others
