"""Linear maps: their weights, and matmuls laid out for the mesh.

Shapes: B batch, T sequence, D embed, F features. Parameters are stored in float32. They are
multiplied in the compute dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.model.layers import fp8
from gpt_jax.model.layers.dropout import drop
from gpt_jax.model.parametrization import make_init

# The roles of the weights that `compute.matmul_dtype` is for. A gate is as narrow as its few
# channels, so that nothing is gained there.
BLOCK_ROLES = ("qkv", "attention_out", "mlp_in", "mlp_out")
# The roles of maps to heads, and from heads.
HEAD_ROLES = ("qkv", "attention_out")


def matmul(
    x: jax.Array,
    kernel: jax.Array,
    out_axis: str | None,
    result_dtype=None,
    seq: str = "seq",
    multiplier: str = "compute",
) -> jax.Array:
    """Multiplies x [B, T, D] with kernel [D, F] -> [B, T, F].

    `out_axis` is the logical axis of F. `seq` is the logical axis of the result's T. Without a
    `result_dtype` the result has the dtype of the inputs. `multiplier` is a row of MULTIPLIERS.
    """
    multiply = MULTIPLIERS[multiplier].multiply
    if sharding.count_parts(seq) > 1 or sharding.has_partial_gradient(kernel):
        layout = sharding.out_spec("batch", seq, out_axis)
        whole = sharding.out_spec("batch", "seq", out_axis)
        return multiply(x, kernel, result_dtype, layout, whole)

    # No mesh axis cuts T, so the activations can be flattened to two dims. XLA's CPU backend runs
    # the backward pass of the three-dim form at half the speed, and no other backend minds.
    rows = x.reshape(-1, x.shape[-1])
    layout = sharding.out_spec("batch", out_axis)
    y = multiply(rows, kernel, result_dtype, layout, layout)
    return sharding.reshape(y, (*x.shape[:-1], kernel.shape[-1]), "batch", seq, out_axis)


def matmul_by_heads(x: jax.Array, kernel: jax.Array, linear: "Weights", seq: str) -> jax.Array:
    """Does what `matmul` does for a map to or from heads, whose matmul has a dim for the heads.

    A TPU's compiler then lays the result [B, T, N, H] out as attention kernels read it. Of a result
    [B, T, N * H] it makes copies for that. For llama:8b's queries on v6e these take a third of the
    cycles, forward and backward.
    """
    width = linear.model.head_dim
    into, out_axis = linear.axes
    features = kernel.shape[1]

    if into == "heads":
        heads = sharding.split_dim(x, 2, width)
        layout = sharding.out_spec("batch", seq, out_axis)
        whole = sharding.out_spec("batch", "seq", out_axis)
        return _multiply(heads, sharding.split_dim(kernel, 0, width), None, layout, whole)

    layout = sharding.out_spec("batch", seq, out_axis, "head_dim")
    y = _multiply(x, sharding.split_dim(kernel, 1, width), None, layout, layout)
    return sharding.reshape(y, (*x.shape[:2], features), "batch", seq, out_axis)


def _contract(x, kernel, dtype, layout) -> jax.Array:
    """Multiplies x [.., D] with a kernel [D, ...], or x [B, T, N, H] with a kernel [N, H, D]."""
    count = 2 if x.ndim == 4 else 1
    dims = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    return jax.lax.dot_general(
        x, kernel, (dims, ((), ())), preferred_element_type=dtype, out_sharding=layout
    )


def _matmul(x, kernel, result_dtype, layout) -> jax.Array:
    def multiply(x, kernel, dtype):
        return _contract(x, kernel, dtype, layout)

    if result_dtype in (None, x.dtype):
        return multiply(x, kernel, None)
    return cast(jax.Array, widen(multiply, x, kernel))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def widen(multiply, x, y):
    """Computes `multiply(x, y, jnp.float32)`, a product whose sums stay in float32.

    The backward pass first rounds the gradient of the result to the dtype of x and y. JAX's own
    transpose would multiply it as it is, and both of its matmuls would run in float32. For the head
    of a small model on a GPU that was a sixth of the whole step.
    """
    return multiply(x, y, jnp.float32)


def _widen_forward(multiply, x, y):
    return widen(multiply, x, y), (x, y)


def _widen_backward(multiply, saved, g):
    _, transpose = jax.vjp(lambda x, y: multiply(x, y, None), *saved)
    return transpose(g.astype(saved[0].dtype))


widen.defvjp(_widen_forward, _widen_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _scattered(x, kernel, result_dtype, layout, whole):
    """Multiplies like `_matmul`, and cuts the result along T (`layout`) where x is not cut.

    The backward pass first gathers the result's gradient to `whole`. This is necessary because
    JAX 0.10 has no transpose for kernels that `sharding.use_weight` has gathered.
    """
    return _matmul(x, kernel, result_dtype, layout)


def _scattered_forward(x, kernel, result_dtype, layout, whole):
    return _scattered(x, kernel, result_dtype, layout, whole), (x, kernel)


def _scattered_backward(result_dtype, layout, whole, saved, g):
    def multiply(x, kernel):
        return _matmul(x, kernel, result_dtype, whole)

    _, transpose = jax.vjp(multiply, *saved)
    return transpose(jax.reshard(g, whole))


_scattered.defvjp(_scattered_forward, _scattered_backward)


def _multiply_wide(x, kernel, result_dtype, layout, whole):
    """Multiplies x with a kernel that is typed wider than x, and has entries of x's dtype.

    All matmuls have operands of x's dtype. The kernel's gradient leaves its matmul in the kernel's
    dtype, so that devices sum it there. `layout` and `whole` are those of `_scattered`.
    """
    return _multiply_narrow(result_dtype, layout, whole, kernel.dtype, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _multiply_narrow(result_dtype, layout, whole, wide, x, kernel):
    kernel = kernel.astype(x.dtype)
    return _contract(x, kernel, result_dtype, layout)


def _multiply_narrow_forward(result_dtype, layout, whole, wide, x, kernel):
    y = _multiply_narrow(result_dtype, layout, whole, wide, x, kernel)
    return y, (x, kernel.astype(x.dtype))


def _multiply_narrow_backward(result_dtype, layout, whole, wide, saved, g):
    x, kernel = saved
    g = g.astype(x.dtype)
    if layout != whole:
        g = jax.reshard(g, whole)

    _, transpose = jax.vjp(lambda x: _contract(x, kernel, None, whole), x)
    (to_x,) = transpose(g)
    lead = tuple(range(min(x.ndim - 1, 2)))
    to_kernel = jax.lax.dot_general(
        x,
        g,
        ((lead, lead), ((), ())),
        preferred_element_type=wide,
        out_sharding=sharding.gradient_spec(kernel),
    )
    return to_x, to_kernel


_multiply_narrow.defvjp(_multiply_narrow_forward, _multiply_narrow_backward)


def _multiply(x, kernel, result_dtype, layout, whole) -> jax.Array:
    """Multiplies in the dtype of x. A kernel of another dtype has its gradient in that."""
    if kernel.dtype != x.dtype:
        return _multiply_wide(x, kernel, result_dtype, layout, whole)
    if layout == whole:
        return _matmul(x, kernel, result_dtype, layout)
    return _scattered(x, kernel, result_dtype, layout, whole)


class Multiplier(NamedTuple):
    """A way to multiply x [.., D] with kernel [D, F], forward and backward.

    `multiply(x, kernel, result_dtype, layout, whole)` gives the result in `layout`. Its backward
    pass first gathers the result's gradient to `whole`. The kernel may be typed wider than x, and
    its gradient then is. `joins` tells whether several kernels can
    be joined into one without changing the results.
    """

    multiply: Callable
    joins: bool


# The values of `compute.matmul_dtype`. In fp8 joined kernels would share a scale, and results would
# depend on the platform and the mesh.
MULTIPLIERS = {"compute": Multiplier(_multiply, True), "fp8": Multiplier(fp8.multiply, False)}


# The collection of variables that has the adapters. It has the keys of the parameters: what lies
# there at the path of a kernel [in, features] is {"a": [in, R], "b": [R, features]}. It may also
# have "gain" [features] and "dropout" []. R is the rank.
ADAPTERS = "adapters"


class Weights(nn.Module):
    """The kernel [in, features] and the bias [features] of a linear map, laid out for use.

    Both are rounded to the compute dtype. Their own dtype is the one in which devices sum their
    gradients. The bias is None for a map without one. `axes` are the kernel's logical axes.
    """

    features: int
    axes: tuple[str, str | None]
    role: str
    model: config.Model
    compute: config.Compute
    bias: bool

    @nn.compact
    def __call__(self, width: int):
        dtypes = self.compute.dtype, self.compute.gradient_dtype
        init = sharding.stored_init(make_init(self.role, self.model), self.axes)
        kernel = self.param("kernel", init, (width, self.features))
        kernel = sharding.use_weight(kernel, self.axes, *dtypes)
        if not self.bias:
            return kernel, None

        zeros = sharding.stored_init(nn.initializers.zeros, self.axes[1:])
        bias = self.param("bias", zeros, (self.features,))
        return kernel, sharding.use_vector(bias, self.axes[1:], *dtypes)

    def adapt(self, x: jax.Array, y: jax.Array, seq: str) -> jax.Array:
        """Adds to y, which is x times the kernel, what an adapter makes of x (Hu et al. 2021).

        It is x @ a @ b, and the sum is multiplied by the adapter's gain. `seq` is the logical axis
        of T in y. Without an adapter it returns y.
        """
        if not self.has_variable(ADAPTERS, "kernel"):
            return y
        adapter = cast(dict, self.get_variable(ADAPTERS, "kernel"))
        if "dropout" in adapter and self.has_rng("dropout"):
            x = drop(x, adapter["dropout"], self.make_rng("dropout"))

        dtypes = self.compute.dtype, self.compute.gradient_dtype
        a = sharding.use_weight(adapter["a"], (self.axes[0], None), *dtypes)
        b = sharding.use_weight(adapter["b"], (None, self.axes[1]), *dtypes)
        y = y + matmul(matmul(x, a, None), b, self.axes[1], seq=seq)
        if "gain" not in adapter:
            return y
        gain = sharding.use_vector(adapter["gain"], self.axes[1:], jnp.float32)
        return (y.astype(jnp.float32) * gain).astype(y.dtype)


def project(x: jax.Array, *maps: Weights) -> list[jax.Array]:
    """Sends x [B, T, in] through several linear maps -> one [B, T, features] for each.

    With `shard_sequence` the stream is gathered over the mesh axis tensor on the way in, and
    scattered on the way out (Korthikanti et al. 2022).
    """
    compute = maps[0].compute
    # Maps out of heads or hidden units lead back to the stream: the sum over tensor ends here.
    leads_back = maps[0].axes[0] in ("heads", "mlp")
    if compute.shard_sequence and not leads_back:
        x = sharding.constrain(x, "batch", "seq", None)

    multiplier = compute.matmul_dtype if maps[0].role in BLOCK_ROLES else "compute"
    weights = [linear(x.shape[-1]) for linear in maps]
    seq = compute.stream if leads_back else "seq"
    can_join = len(maps) > 1 and sharding.axis_size("tensor") == 1 and MULTIPLIERS[multiplier].joins
    if can_join and sharding.habits().join_projections:
        parts = _multiply_joined(x, [kernel for kernel, _ in weights])
    else:
        parts = [
            matmul_by_heads(x, kernel, linear, seq)
            if multiplier == "compute" and _is_by_heads(linear)
            else matmul(x, kernel, linear.axes[1], seq=seq, multiplier=multiplier)
            for linear, (kernel, _) in zip(maps, weights, strict=True)
        ]

    parts = [linear.adapt(x, y, seq) for linear, y in zip(maps, parts, strict=True)]
    return [
        y if bias is None else (y + bias).astype(y.dtype)
        for y, (_, bias) in zip(parts, weights, strict=True)
    ]


def _is_by_heads(linear: Weights) -> bool:
    multiple = sharding.habits().split_heads
    return multiple > 0 and linear.role in HEAD_ROLES and linear.model.head_dim % multiple == 0


def _multiply_joined(x: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
    """Multiplies x with kernels that are joined into one, and cuts the result apart again.

    This saves 5 % of a small step on a CPU. A TPU would lose a sixth of a large step by the
    compiler's cycles. It has to join and cut, and its matmul runs at half the speed. The kernels'
    features must not be cut over the mesh.
    """
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])[:-1]
    joined = matmul(x, jnp.concatenate(kernels, 1), None)
    return jnp.split(joined, ends, -1)
