"""Sends choices through this device's own experts.

A *choice* is one token at one expert: token t makes choices t * k … t * k + k - 1. Two index
vectors move choices, and each is the inverse of the other. `there` tells which choice stands at a
place. `back` tells at which place a choice stands. An index beyond the end means none.

Shapes: n tokens of this device, k choices of each, D embed, F mlp, E experts in all, of which this
device has E / p.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config
from gpt_jax.model.experts.grouped_matmuls import GROUPED_DOTS, TILE


class Kernels(NamedTuple):
    """This device's experts: down [E / p, F, D], up and gate [E / p, D, F].

    Their gradients have their dtype. They are multiplied in the dtype of what goes through them.
    """

    down: jax.Array
    up: jax.Array
    gate: jax.Array | None = None


# ---- moving choices ----


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def pick(x, there, back, fan):
    """Puts row there[i] // fan of x [n, D] at place i -> [places, D], and zeros for none.

    `back` [n * fan] makes the backward pass a lookup too. The transpose of a lookup would be a
    scatter, which is slow on every accelerator.
    """
    return jnp.take(x, there // fan, axis=0, mode="fill", fill_value=0)


def _pick_forward(x, there, back, fan):
    return pick(x, there, back, fan), back


def _pick_backward(fan, back, g):
    ones = jnp.ones((back.size // fan, fan), jnp.float32)
    return combine(g, ones, None, back), None, None


pick.defvjp(_pick_forward, _pick_backward)


@jax.custom_vjp
def combine(rows, weight, there, back):
    """Sums the choices of each token from rows [places, D], with weight [n, k] -> [n, D].

    The sum is in float32. `there` and `back` are those of `pick`.

    The j-th choices of all tokens are added after the j-1st. One array [n, k, D] of float32 would
    be the largest of all, and a TPU would pad its k to 8.
    """
    terms = (
        _take_column(rows, back, weight.shape, j) * weight[:, j, None]
        for j in range(weight.shape[1])
    )
    return cast(jax.Array, sum(terms)).astype(rows.dtype)


def _take_column(rows, back, shape, j):
    """Takes the j-th choice of each token, in float32."""
    column = back.reshape(shape)[:, j]
    return jnp.take(rows, column, axis=0, mode="fill", fill_value=0).astype(jnp.float32)


def _combine_forward(rows, weight, there, back):
    return combine(rows, weight, there, back), (rows, weight, there, back)


def _combine_backward(saved, g):
    rows, weight, there, back = saved
    fan = weight.shape[1]
    scale = jnp.take(weight.ravel(), there, mode="fill", fill_value=0)[:, None]
    to_rows = jnp.take(g, there // fan, axis=0, mode="fill", fill_value=0) * scale
    to_weight = [(_take_column(rows, back, weight.shape, j) * g).sum(-1) for j in range(fan)]
    return to_rows.astype(rows.dtype), jnp.stack(to_weight, -1), None, None


combine.defvjp(_combine_forward, _combine_backward)


class Placed(NamedTuple):
    """The experts' results: rows [places, D], and the two index vectors."""

    rows: jax.Array
    there: jax.Array
    back: jax.Array


def sort_choices(experts: jax.Array, count: int):
    """Sorts choices [c] by expert, earlier ones first -> (order, rank, sizes).

    An expert of `count` stands for none.
    """
    order = jnp.argsort(experts, stable=True)
    sizes = (experts[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
    return order, jnp.argsort(order), sizes


def starts_of(sizes):
    """Returns where groups of these `sizes` begin, one after the other."""
    return jnp.cumsum(sizes, axis=-1) - sizes


def spread_to_places(order, starts, sizes, width: int):
    """Spreads groups of choices to `width` fixed places each -> [groups * width].

    A group begins at its entry of `starts` [groups] in `order`, and has `sizes` choices. The rest
    of its places are order.size, which stands for none.
    """
    place = jnp.arange(width)
    choice = jnp.take(order, starts[:, None] + place, mode="clip")
    return jnp.where(place < sizes[:, None], choice, order.size).ravel()


# ---- the feed-forward of experts ----


def multiply_by_expert(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies rows [E, n, in] with each expert's kernel [E, in, out] -> [E, n, out]."""
    return cast(jax.Array, _multiply_by_expert(kernel.dtype, rows, kernel))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_by_expert(gradient_dtype, rows, kernel):
    return jnp.einsum("end,edf->enf", rows, kernel.astype(rows.dtype))


def _multiply_by_expert_forward(gradient_dtype, rows, kernel):
    saved = (rows, kernel.astype(rows.dtype))
    return _multiply_by_expert(gradient_dtype, rows, kernel), saved


def _multiply_by_expert_backward(gradient_dtype, saved, g):
    rows, kernel = saved
    to_rows = jnp.einsum("enf,edf->end", g, kernel)
    return to_rows, jnp.einsum("end,enf->edf", rows, g, preferred_element_type=gradient_dtype)


_multiply_by_expert.defvjp(_multiply_by_expert_forward, _multiply_by_expert_backward)


def feed_forward(
    x, experts, fan: int, kernels: Kernels, activation: Callable, habits: config.Habits, likely: int
) -> Placed:
    """Sends x [n, D] through the experts of each choice.

    `experts` [n * fan] are 0 … E / p - 1, and E / p stands for none. `likely` is the number of
    real choices when tokens spread evenly. The first of the habits' ways is taken.
    """
    way = habits.expert_matmuls[0]
    if way == "blocks":
        return by_blocks(x, experts, fan, kernels, activation, habits.sum_rows, likely)
    return by_sorting(x, experts, fan, kernels, activation, GROUPED_DOTS[way])


def compute_hidden(activation: Callable, up, gate=None):
    """Computes what goes into the last matmul, from the results of the first ones."""
    return activation(up) if gate is None else activation(gate) * up


def first_kernels(kernels: Kernels) -> tuple:
    """Returns the kernels that rows meet first: up, and gate where experts have one."""
    return kernels[1:] if kernels.gate is not None else (kernels.up,)


# ---- sorted: TPUs, and GPUs if asked ----


def by_sorting(
    x, experts, fan: int, kernels: Kernels, activation: Callable, dot: Callable
) -> Placed:
    """Sorts choices by expert for a grouped matmul, `dot`, that multiplies each of them once."""
    count = kernels.up.shape[0]
    order, rank, sizes = sort_choices(experts, count)

    # The places fill whole tiles.
    places = -(-experts.size // TILE) * TILE
    padded = jnp.pad(order, (0, places - order.size))
    there = jnp.where(jnp.arange(places) < sizes.sum(), padded, experts.size)
    back = jnp.where(experts < count, rank, places)

    rows = checkpoint_name(pick(x, there, back, fan), "experts_in")
    hidden = compute_hidden(
        activation, *(dot(rows, kernel, sizes) for kernel in first_kernels(kernels))
    )
    return Placed(dot(hidden, kernels.down, sizes), there, back)


# ---- blocks: GPUs and CPUs ----


def by_blocks(
    x, experts, fan: int, kernels: Kernels, activation: Callable, sum_rows: int, likely: int
) -> Placed:
    """Pads each expert's choices to whole blocks, and sends one block at a time through its expert.

    The idea is that of MegaBlocks (Gale et al. 2022, arXiv:2211.15841). This is plain XLA and runs
    everywhere. XLA's `ragged_dot` multiplies every row with every expert on GPUs and CPUs.
    triton_matmuls.py has kernels for some GPUs that do not.
    """
    count = kernels.up.shape[0]
    order, rank, sizes = sort_choices(experts, count)
    size = choose_block_rows(likely, count, sum_rows)
    blocks = -(-sizes // size)
    most_blocks = experts.size // size + count
    blocks_before = starts_of(blocks)
    starts = starts_of(sizes)

    # Block i belongs to the expert `owner`, which has `passed` choices in earlier blocks.
    number = jnp.arange(most_blocks)
    owner = (number[:, None] >= jnp.cumsum(blocks)).sum(-1).clip(0, count - 1)
    passed = (number - blocks_before[owner]) * size

    there = spread_to_places(order, starts[owner] + passed, sizes[owner] - passed, size)
    place = blocks_before[experts] * size + rank - starts[experts]
    back = jnp.where(experts < count, place, there.size)
    rows = checkpoint_name(pick(x, there, back, fan), "experts_in")
    return Placed(through_blocks(activation, size, rows, kernels, blocks), there, back)


def choose_block_rows(choices: int, experts: int, sum_rows: int) -> int:
    """Chooses the rows of a block: a power of two, at least 8.

    A block has at most the rows that an expert gets where `choices` spread evenly. Up to this
    limit, two costs are balanced: half a block of padding for each expert, and adding gradients
    once a block (`sum_rows`, see config/habits.py).
    """
    rows = max(1, choices // experts)
    best = round(math.log2(2 * sum_rows * rows) / 2)
    return 2 ** max(3, min(best, rows.bit_length() - 1))


def through_blocks(activation, size: int, rows, kernels: Kernels, blocks):
    """Sends rows [places, D] through experts, `size` at a time.

    The first blocks[0] blocks go through expert 0, the next blocks[1] through expert 1, and so on.
    The rest are zeros, and take no time.

    Only one block's hidden values live at a time, because the backward pass computes them anew.

    The outer loop runs over experts, so that an expert's weights are looked up once. Its gradients
    are summed in float32 in place, by nothing but the matmul that adds to them. An index there
    would cost copies of all of them for each block.
    """
    return _through_blocks(activation, size, kernels.up.dtype, rows, kernels, blocks)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _through_blocks(activation, size, gradient_dtype, rows, kernels, blocks):
    kernels = _cast(kernels, rows.dtype)
    ends = jnp.cumsum(blocks)

    def run_expert(e, out):
        own = _take_expert(kernels, e)

        def run_block(i, out):
            row = _take_block(rows, size, i)
            first = (row @ kernel for kernel in first_kernels(own))
            return _put_block(out, i, compute_hidden(activation, *first) @ own.down)

        return jax.lax.fori_loop(ends[e] - blocks[e], ends[e], run_block, out)

    return jax.lax.fori_loop(0, blocks.size, run_expert, jnp.zeros_like(rows))


def _through_blocks_forward(activation, size, gradient_dtype, rows, kernels, blocks):
    out = _through_blocks(activation, size, gradient_dtype, rows, kernels, blocks)
    return out, (rows, _cast(kernels, rows.dtype), blocks)


def _through_blocks_backward(activation, size, gradient_dtype, saved, g):
    rows, kernels, blocks = saved
    ends = jnp.cumsum(blocks)

    def run_expert(e, carry):
        own = _take_expert(kernels, e)

        def run_block(i, carry):
            to_rows, sums = carry
            row = _take_block(rows, size, i)
            to_row, parts = _pull_block(activation, own, row, _take_block(g, size, i))
            to_rows = _put_block(to_rows, i, to_row.astype(rows.dtype))
            return to_rows, Kernels(*map(jnp.add, sums, parts))

        def put(grad, own_sum):
            return jax.lax.dynamic_update_index_in_dim(grad, own_sum.astype(grad.dtype), e, 0)

        to_rows, grads = carry
        sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), own)
        to_rows, sums = jax.lax.fori_loop(ends[e] - blocks[e], ends[e], run_block, (to_rows, sums))
        return to_rows, jax.tree.map(put, grads, sums)

    no_gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, gradient_dtype), kernels)
    zeros = (jnp.zeros_like(rows), no_gradients)
    to_rows, grads = jax.lax.fori_loop(0, blocks.size, run_expert, zeros)
    return to_rows, grads, None


def _pull_block(activation, own: Kernels, row, g):
    """Computes the float32 gradients of one block: of its rows, and of its expert's kernels."""
    multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
    first = (row @ kernel for kernel in first_kernels(own))
    hidden, transpose = jax.vjp(partial(compute_hidden, activation), *first)
    inner = transpose(g @ own.down.T)

    to_down = multiply(hidden.T, g)
    to_first = [multiply(row.T, part) for part in inner]
    terms = (
        multiply(part, kernel.T) for part, kernel in zip(inner, first_kernels(own), strict=True)
    )
    return cast(jax.Array, sum(terms)), (to_down, *to_first)


_through_blocks.defvjp(_through_blocks_forward, _through_blocks_backward)


def _cast(kernels: Kernels, dtype) -> Kernels:
    return jax.tree.map(lambda kernel: kernel.astype(dtype), kernels)


def _take_expert(kernels: Kernels, expert) -> Kernels:
    def take(kernel):
        return jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)

    return jax.tree.map(take, kernels)


def _take_block(rows, size, i):
    return jax.lax.dynamic_slice_in_dim(rows, i * size, size)


def _put_block(rows, i, block):
    return jax.lax.dynamic_update_slice_in_dim(rows, block, i * block.shape[0], 0)
