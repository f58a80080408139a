"""Sums over the chunks of a batch, whose gradient is made together with them.

One pass over the chunks makes the logits of each, their sums, and the gradient of one of the sums.
Nothing of a chunk is kept but these. The backward pass therefore makes no logits again, and memory
never holds those of two chunks (Hsu et al. 2024, Liger Kernel; Wijmans et al. 2024).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from gpt_jax import sharding


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_chunks(sum_chunk: Callable, learned: str, heads: list, hiddens: list, columns: dict):
    """Adds `sum_chunk(heads, hiddens, columns) -> Sums` over chunks.

    `heads` are used by every chunk, each with its own of `hiddens`. A head has entries of the dtype
    of that, and may be typed wider: its gradient then is. Each array of `hiddens` and `columns` has
    the chunks as its first dim, and `sum_chunk` gets one entry of it.

    The sum `learned` has a gradient by heads and hiddens. It is made here if somebody
    differentiates. A head's gradient is added up in float32. Raises TypeError where another sum is
    differentiated, or where a column is.
    """

    def add_chunk(_, chunk):
        return None, sum_chunk(heads, *chunk)

    _, parts = jax.lax.scan(add_chunk, None, (hiddens, columns))
    return _add_up(parts)


def _forward(sum_chunk, learned, heads, hiddens, columns):
    """Returns (Sums, gradients of the learned one by heads and hiddens)."""
    if any(column.perturbed for column in jax.tree.leaves(columns)):
        raise TypeError("a loss in chunks has no gradient by the columns of its batch")
    has_gradient = [[x.perturbed for x in inputs] for inputs in (heads, hiddens)]
    heads, hiddens, columns = jax.tree.map(lambda x: x.value, (heads, hiddens, columns))
    # The loop keeps heads as narrow as their entries are, and widens them where they are used.
    narrow = [head.astype(hidden.dtype) for head, hidden in zip(heads, hiddens, strict=True)]

    def add_chunk(totals, chunk):
        hiddens, columns = chunk

        def measure(heads, hiddens):
            sums = sum_chunk(heads, hiddens, columns)
            if learned not in sums:
                raise TypeError(f"a loss in chunks has no sum {learned!r}: name one in `learned`")
            return sums[learned][0], sums

        wide = [x.astype(head.dtype) for x, head in zip(narrow, heads, strict=True)]
        value, transpose, sums = jax.vjp(measure, wide, hiddens, has_aux=True)
        # A frozen model has no gradient, so that the compiler drops the matmuls that made it.
        by_heads, by_hiddens = map(_select, transpose(jnp.ones_like(value)), has_gradient)
        totals = jax.tree.map(lambda total, g: total + g.astype(total.dtype), totals, by_heads)
        return totals, (by_hiddens, sums)

    zeros = jax.tree.map(sharding.make_zero_gradient, _select(heads, has_gradient[0]))
    totals, (by_hiddens, parts) = jax.lax.scan(add_chunk, zeros, (hiddens, columns))
    by_heads = [
        None if g is None else g.astype(x.dtype) for g, x in zip(totals, heads, strict=True)
    ]
    return _add_up(parts), (by_heads, by_hiddens)


def _backward(sum_chunk, learned, gradients, slopes):
    """Multiplies the gradients with the slope of what is minimised by the learned sum."""
    slope, weight = slopes[learned]
    measured = [slope for name, slope in slopes.items() if name != learned]
    if not all(map(_is_zero, jax.tree.leaves((weight, measured)))):
        raise TypeError(
            f"a loss in chunks has the gradient of its sum {learned!r} alone, and another sum is "
            "differentiated: name that one in `learned`, or set config.train.loss_chunk = 0"
        )

    if _is_zero(slope):
        return None, None, None
    by_heads, by_hiddens = jax.tree.map(lambda g: sharding.scale_gradient(g, slope), gradients)
    return by_heads, by_hiddens, None


add_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def _select(values: list, is_wanted: list[bool]) -> list:
    """Replaces the values that are not wanted by None."""
    return [x if wanted else None for x, wanted in zip(values, is_wanted, strict=True)]


def _is_zero(slope) -> bool:
    """Whether nothing is differentiated by a sum. Whole numbers have slopes of dtype float0."""
    return isinstance(slope, SymbolicZero) or slope.dtype == jax.dtypes.float0


def _add_up(parts: dict) -> dict:
    return jax.tree.map(lambda x: x.sum(0), parts)
