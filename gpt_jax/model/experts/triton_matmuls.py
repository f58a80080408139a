"""Matmuls of rows that are grouped by expert, as Pallas kernels that Triton compiles for GPUs.

Each row is multiplied once, with the kernel of its own expert. XLA's `ragged_dot` multiplies every
row with every expert on GPUs: it writes one dense matmul [m, g * in] x [g * in, out].

Tiles begin where a group begins, so a tile has rows of one group only. Rows beyond the groups are
neither read nor written, so results have undefined values there. Sums are float32.

Shapes: m rows, g groups. `sizes` [g] are the rows of each group, and groups lie one after another.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gpt_jax import config

# Tiles have at most so many rows and columns, and this many stages of loads run ahead. No GPU was
# at hand to tune them. Three stages of bfloat16 take 96 KiB, which every GPU since A100 has.
SIDE = 128
DEPTH = 64
PARAMS = triton.CompilerParams(num_warps=8, num_stages=3)
BAND = 8  # So many tiles of rows share the columns that the cache holds.


def grouped_dot(rows, kernel, sizes):
    """Multiplies rows [m, in] with their group's kernel [g, in, out] -> [m, out].

    The product is in the dtype of `rows`, and the kernel's gradient in that of `kernel`. Raises
    ValueError if a width is not divisible by config.GROUPED_WIDTH.
    """
    return _grouped_dot(kernel.dtype, rows, kernel, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(gradient_dtype, rows, kernel, sizes):
    return multiply(rows, kernel.astype(rows.dtype), sizes)


def _grouped_dot_forward(gradient_dtype, rows, kernel, sizes):
    saved = (rows, kernel.astype(rows.dtype), sizes)
    return multiply(*saved), saved


def _grouped_dot_backward(gradient_dtype, saved, g):
    rows, kernel, sizes = saved
    to_rows = multiply(g, kernel, sizes, is_transposed=True)
    return to_rows, sum_products(rows, g, sizes, gradient_dtype), None


_grouped_dot.defvjp(_grouped_dot_forward, _grouped_dot_backward)


# ---- rows with kernels ----


def multiply(rows, kernel, sizes, is_transposed: bool = False):
    """Multiplies rows [m, in] with kernel [g, in, out] -> [m, out].

    If `is_transposed`, it multiplies rows [m, out] with each kernel's transpose -> [m, in].
    """
    m, depth = rows.shape
    width = kernel.shape[1] if is_transposed else kernel.shape[2]
    step = _choose_side(depth, _limit_depth(rows.dtype))
    side = _choose_side(width, SIDE)

    tiles = _list_tiles(sizes, m)
    count = tiles[0].size
    run = partial(
        _multiply_tile,
        is_transposed=is_transposed,
        tiles=count,
        columns=width // side,
        side=side,
        step=step,
    )
    return pl.pallas_call(
        run,
        grid=(count * (width // side),),
        out_shape=jax.ShapeDtypeStruct((m, width), rows.dtype),
        compiler_params=PARAMS,
        name="experts_multiply",
    )(*tiles, rows, kernel)


def _list_tiles(sizes, m: int):
    """Lists tiles of SIDE rows -> (group, first row, end of the group), each [tiles].

    A tile whose first row is not before the end has nothing to do.
    """
    count = m // SIDE + sizes.size
    tiles = -(-sizes // SIDE)
    ends = jnp.cumsum(tiles)
    rows_end = jnp.cumsum(sizes)

    number = jnp.arange(count, dtype=jnp.int32)
    group = (number[:, None] >= ends).sum(-1, dtype=jnp.int32).clip(0, sizes.size - 1)
    passed = (number - (ends - tiles)[group]) * SIDE
    return group, (rows_end - sizes)[group] + passed, rows_end[group]


def _multiply_tile(
    group_ref,
    first_ref,
    end_ref,
    rows_ref,
    kernel_ref,
    out_ref,
    *,
    is_transposed: bool,
    tiles: int,
    columns: int,
    side: int,
    step: int,
):
    tile, column = _find_tile(pl.program_id(0), tiles, columns)
    first = first_ref[tile]
    end = end_ref[tile]
    depth = rows_ref.shape[1]

    @pl.when(first < end)
    def _():
        group = group_ref[tile]
        here = pl.ds(first, SIDE)
        is_own = _mask_rows(first, end, SIDE)
        own = pl.ds(column * side, side)

        def add(i, total):
            part = pl.ds(i * step, step)
            rows = triton.load(rows_ref.at[here, part], mask=is_own, other=0)
            if is_transposed:
                return total + triton.dot(rows, kernel_ref[group, own, part], trans_b=True)
            return total + triton.dot(rows, kernel_ref[group, part, own])

        total = jnp.zeros((SIDE, side), jnp.float32)
        total = jax.lax.fori_loop(0, depth // step, add, total)
        triton.store(out_ref.at[here, own], total.astype(out_ref.dtype), mask=is_own)


def _find_tile(number, tiles: int, columns: int):
    """Finds (tile of rows, column) of a program, so that a band of tiles goes through columns."""
    band = number // (BAND * columns)
    height = jnp.minimum(tiles - band * BAND, BAND)
    inside = number % (BAND * columns)
    return band * BAND + inside % height, inside // height


def _mask_rows(first, end, count: int):
    """Returns which of `count` rows from `first` on are before `end`, [count, 1].

    The others may be beyond the array. Loads and stores that are masked touch nothing.
    """
    return (first + jnp.arange(count) < end)[:, None]


# ---- the kernels' gradient ----


def sum_products(rows, g, sizes, dtype):
    """Sums rows[i]^T g[i] over each group: [m, in], [m, out] -> [g, in, out] of `dtype`."""
    width = rows.shape[1]
    width_out = g.shape[1]
    side = _choose_side(width, SIDE)
    side_out = _choose_side(width_out, SIDE)

    ends = jnp.cumsum(sizes)
    run = partial(_sum_group, sides=(side, side_out), step=_limit_depth(rows.dtype))
    return pl.pallas_call(
        run,
        grid=(width_out // side_out, width // side, sizes.size),
        out_shape=jax.ShapeDtypeStruct((sizes.size, width, width_out), dtype),
        compiler_params=PARAMS,
        name="experts_sum_products",
    )(ends - sizes, ends, rows, g)


def _sum_group(first_ref, end_ref, rows_ref, g_ref, out_ref, *, sides: tuple[int, int], step: int):
    group = pl.program_id(2)
    own = pl.ds(pl.program_id(1) * sides[0], sides[0])
    own_out = pl.ds(pl.program_id(0) * sides[1], sides[1])
    first = first_ref[group]
    end = end_ref[group]

    def add(i, total):
        start = first + i * step
        is_own = _mask_rows(start, end, step)
        # Both are masked, because rows beyond the groups may be NaN, and 0 * NaN is NaN.
        rows = triton.load(rows_ref.at[pl.ds(start, step), own], mask=is_own, other=0)
        g = triton.load(g_ref.at[pl.ds(start, step), own_out], mask=is_own, other=0)
        return total + triton.dot(rows, g, trans_a=True)

    turns = (end - first + step - 1) // step
    total = jax.lax.fori_loop(0, turns, add, jnp.zeros(sides, jnp.float32))
    out_ref[group, own, own_out] = total.astype(out_ref.dtype)


# ---- sizes ----


def _choose_side(width: int, most: int) -> int:
    """Chooses the largest power of two up to `most` that divides a width."""
    side = math.gcd(width, most)
    if side < config.GROUPED_WIDTH:
        raise ValueError(
            f"a width of experts is {width}: it must be divisible by {config.GROUPED_WIDTH}"
        )
    return side


def _limit_depth(dtype) -> int:
    """Returns how deep a step may be, so that float32 takes no more memory than bfloat16."""
    return DEPTH * 2 // jnp.dtype(dtype).itemsize
