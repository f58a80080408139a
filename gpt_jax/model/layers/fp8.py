"""Matmuls of float8 numbers, with one scale a tensor (Micikevicius et al. 2022, arXiv:2209.05433).

Operands of the forward pass are float8_e4m3fn, and the gradient of the result is float8_e5m2. A
scale comes from the tensor's largest absolute value as it is now, over the whole mesh. The recipe
is that of torchao's tensorwise dynamic scaling with `round_scales_to_power_of_2`.

Shapes: B batch, T sequence, D embed, F features; a flattened batch has rows in place of B and T.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding

OPERAND = jnp.float8_e4m3fn
GRADIENT = jnp.float8_e5m2


class Scaled(NamedTuple):
    """A tensor as float8 `values` times one float32 `scale`, which is a power of two."""

    values: jax.Array
    scale: jax.Array


def quantize(x: jax.Array, dtype) -> Scaled:
    """Rounds x to the float8 `dtype`, scaled so that its largest entry just fits.

    Zeros stay zeros, and so do tensors whose largest entry is below 6e-34. If an entry is NaN or
    infinite, the scale is NaN, and so is every product with this tensor.
    """
    scale = find_scale(x, float(jnp.finfo(dtype).max))
    # The inverse of a power of two is exact in every dtype, so entries are rounded once.
    return Scaled((x * (1 / scale).astype(x.dtype)).astype(dtype), scale)


def find_scale(x: jax.Array, limit: float) -> jax.Array:
    """Finds the smallest power of two, in float32, that brings all of x within `limit`."""
    # As whole numbers, positive floats have the same order, and NaN is above infinity. A sum over
    # devices that takes the largest float leaves NaN out (JAX 0.10 on CPUs).
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
    largest = jax.lax.bitcast_convert_type(bits.max(), jnp.float32)

    # The ratio is mantissa * 2^exponent, where the mantissa lies in [0.5, 1).
    ratio = largest / limit
    mantissa, exponent = jnp.frexp(ratio)
    scale = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))
    # Float32 has no inverse of a power below its smallest normal number. Zeros come here too.
    scale = jnp.where(ratio < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


class Form(NamedTuple):
    """Dtypes and layouts of a product. Layouts are None without a mesh."""

    dtype: jnp.dtype  # Of x and its gradient.
    kernel_dtype: jnp.dtype  # Of the kernel's gradient.
    result_dtype: jnp.dtype
    layout: P | None  # Of the result.
    whole: P | None  # Of the result's gradient where the backward pass multiplies it.
    x_layout: P | None
    kernel_layout: P | None  # With the type `reduced` of a gathered kernel.


def multiply(
    x: jax.Array, kernel: jax.Array, result_dtype, layout: P | None, whole: P | None
) -> jax.Array:
    """Multiplies x [B, T, D] or [rows, D] with kernel [D, F], in float8 as its gradients do.

    `layout` is that of the result. The backward pass gathers the result's gradient to `whole`.
    Without a `result_dtype` the result has the dtype of x.
    """
    own = None if layout is None else jax.typeof(x).sharding.spec
    kept = None if layout is None else jax.typeof(kernel).sharding.spec
    form = Form(x.dtype, kernel.dtype, jnp.dtype(result_dtype or x.dtype), layout, whole, own, kept)
    return _multiply(x, kernel, form)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x, kernel, form: Form):
    return _multiply_forward(x, kernel, form)[0]


def _multiply_forward(x, kernel, form: Form):
    if form.kernel_layout is not None:
        # The type `reduced` says how the gradient is summed, and maxima refuse it.
        kernel = jax.reshard(kernel, P(*form.kernel_layout.partitions))
    a = quantize(x, OPERAND)
    b = quantize(kernel.astype(x.dtype), OPERAND)
    y = _dot(a, b, ((x.ndim - 1,), (0,)), form.result_dtype, form.layout)
    return y, (a, b)


def _multiply_backward(form: Form, saved, g):
    a, b = saved
    if form.whole is not None:
        g = jax.reshard(g, form.whole)
    c = quantize(g, GRADIENT)

    to_x = _dot(c, b, ((g.ndim - 1,), (1,)), form.dtype, form.x_layout)
    rows = tuple(range(g.ndim - 1))
    layout = form.kernel_layout
    if layout is not None:
        layout = P(*layout.partitions, unreduced=layout.reduced)
    return to_x, _dot(a, c, (rows, rows), form.kernel_dtype, layout)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _dot(a: Scaled, b: Scaled, contracted: tuple, dtype, layout: P | None) -> jax.Array:
    """Multiplies two scaled tensors over the dims `contracted` of each.

    XLA's compiler for GPUs makes one call of cuBLASLt of this. Its gemm_rewriter.cc takes a dot
    whose operands are float8, and a product of the result with one scalar. Flax relies on the same
    form (Fp8DirectDotGeneralOp).

    Sums are float32 before the result is rounded to `dtype`. Scaling by a power of two rounds
    nothing, so the order does not matter. A float32 result is twice as large in memory and on the
    wire, so only `compute.reduce_dtype` asks for it.
    """
    y = jax.lax.dot_general(
        a.values,
        b.values,
        (contracted, ((), ())),
        # At the default precision XLA lets cuBLASLt accumulate fast, in fewer bits than float32.
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=layout,
    )
    return sharding.scale(y, a.scale * b.scale)
