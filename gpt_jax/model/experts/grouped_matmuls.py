"""Matmuls of rows [m, in] that are grouped by expert, with kernels [g, in, out] -> [m, out].

`sizes` [g] are the rows of each group, and groups lie one after another. What stands in the rows
beyond them is undefined in results. A kernel's gradient has the kernel's dtype.
"""

from functools import partial

import jax

TILE = 128  # rows of a matrix unit's tile


def ragged_dot(rows, kernel, sizes):
    """Does what `jax.lax.ragged_dot` does, with megablox's tgmm for the kernels' gradient.

    libtpu 0.0.42 has good kernels for the result and the rows' gradient. For the kernels' gradient
    it multiplies all rows for every expert.
    """
    return _ragged_dot(kernel.dtype, rows, kernel, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_dot(gradient_dtype, rows, kernel, sizes):
    return jax.lax.ragged_dot(rows, kernel.astype(rows.dtype), sizes)


def _ragged_dot_forward(gradient_dtype, rows, kernel, sizes):
    saved = (rows, kernel.astype(rows.dtype), sizes)
    return _ragged_dot(gradient_dtype, rows, kernel, sizes), saved


def _ragged_dot_backward(gradient_dtype, saved, g):
    rows, kernel, sizes = saved

    def multiply(rows):
        return jax.lax.ragged_dot(rows, kernel, sizes)

    (to_rows,) = jax.linear_transpose(multiply, rows)(g)
    return to_rows, kernel_gradient(rows, g, sizes, gradient_dtype), None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


def kernel_gradient(rows, g, sizes, dtype, interpret: bool = False):
    """Sums rows[i]^T g[i] over each group: [m, in], [m, out] -> [groups, in, out].

    m must be a multiple of TILE.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile = next(size for size in (512, 256, TILE) if rows.shape[0] % size == 0)
    tiling = (tile, *(min(1024, x.shape[1]) for x in (rows, g)))
    return tgmm(rows.T, g, sizes, dtype, tiling, interpret=interpret)


def grouped_dot(rows, kernel, sizes):
    """Does what `ragged_dot` does, by Triton's kernels for GPUs."""
    # This is loaded only if it is asked for, because a later JAX removes its backend for Triton.
    from gpt_jax.model.experts import triton_matmuls

    return triton_matmuls.grouped_dot(rows, kernel, sizes)


# Ways of compute.expert_matmul. They take (rows, kernel, sizes), and whole tiles of rows.
GROUPED_DOTS = {"sorted": ragged_dot, "grouped": grouped_dot}
