"""Moves arrays between the layouts of a mesh.

A weight is *stored* split over `tensor`, over `fsdp` and over the other axes that repeat the model.
Its layers are split over `pipeline`. It is *used* split over `tensor` alone: `use_weight` casts and
gathers it where it is multiplied, and the transpose of that scatters the gradient. Without a mesh,
that is before `jax.set_mesh`, every function here is the identity.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from gpt_jax.config import FSDP_AXES
from gpt_jax.sharding.rules import (
    _CHANGED,
    STORED,
    _mesh,
    _names,
    axis_size,
    habits,
    make_spec,
    out_spec,
    used_spec,
)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the USED rules. It states the layout of an activation where that is made."""
    return x if _mesh() is None else jax.reshard(x, used_spec(*axes))


def use_weight(
    weight: jax.Array, axes: tuple[str | None, ...], dtype, gradient_dtype=None
) -> jax.Array:
    """A stored weight, rounded to the compute dtype and gathered over fsdp.

    The rounding comes first, because it halves the bytes on the wire. The result has the dtype
    `gradient_dtype`, in which its gradient is summed over devices. Without one that is `dtype`. A
    matmul casts a wider weight back, which changes no value.

    A gathered weight is typed as `reduced` over the axes of rows and tokens. Its gradient therefore
    stays each device's own part of a sum until one scatter brings it to where the weight is stored.
    A plain reshard would sum whole gradients on every device. Under the vmap of a pipeline's stages
    JAX 0.10 refuses that type, so there a plain reshard is used.
    """
    where = find_gathered_axes(weight, axes)
    if where is None or _CHANGED.get():
        return send_narrow(lambda weight: constrain(weight, *axes), weight, dtype, gradient_dtype)

    dim, names = where
    rows = _find_row_axes()
    spec = jax.typeof(weight).sharding.spec
    in_spec = P(*spec, reduced=rows - frozenset(names))
    whole = [None if i == dim else part for i, part in enumerate(spec)]

    gather_shard = jax.shard_map(
        lambda shard: gather(shard, names, dim, to="reduced"),
        in_specs=in_spec,
        out_specs=P(*whole, reduced=rows),
    )
    return send_narrow(
        lambda weight: gather_shard(jax.reshard(weight, in_spec)), weight, dtype, gradient_dtype
    )


def use_vector(
    vector: jax.Array, axes: tuple[str | None, ...], dtype, gradient_dtype=None
) -> jax.Array:
    """A stored vector that is added to activations, rounded and typed as by `use_weight`."""
    return send_narrow(lambda vector: constrain(vector, *axes), vector, dtype, gradient_dtype)


def send_narrow(move: Callable, weight: jax.Array, dtype, gradient_dtype=None) -> jax.Array:
    """`move(weight)`, sent in `dtype`, whose gradient comes back in `gradient_dtype`.

    `move` is linear and sends an array between devices. The result has the dtype `gradient_dtype`,
    or `dtype` without one. Its entries are rounded to `dtype`, and its gradient is not.
    """
    if gradient_dtype is None or jnp.dtype(gradient_dtype) == jnp.dtype(dtype):
        return move(weight.astype(dtype))
    wide = weight.astype(gradient_dtype)
    return _send_narrow(move, jnp.dtype(dtype), jax.typeof(wide), wide)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _send_narrow(move, dtype, kind, weight):
    """`move(weight)` in `dtype`, cast to the dtype of the weight, which is of type `kind`."""
    # The compiler drops both casts where a matmul casts the result to `dtype` again.
    return move(weight.astype(dtype)).astype(weight.dtype)


def _send_narrow_forward(move, dtype, kind, weight):
    return _send_narrow(move, dtype, kind, weight), None


def _send_narrow_backward(move, dtype, kind, _, g):
    # `move` is linear, so that its transpose is the same at zeros. The compiler drops those.
    spec = None if _mesh() is None else kind.sharding.spec
    zeros = jnp.zeros(kind.shape, kind.dtype, out_sharding=spec)
    _, transpose = jax.vjp(move, zeros)
    return transpose(g)


_send_narrow.defvjp(_send_narrow_forward, _send_narrow_backward)


def _find_row_axes() -> frozenset[str]:
    """The mesh axes that cut rows and tokens, over which gradients of weights are summed."""
    return frozenset(name for part in used_spec("batch", "seq") for name in _names(part))


def sum_gradient_once(weight: jax.Array) -> jax.Array:
    """A used weight whose gradient stays each device's own part of a sum until it leaves here.

    A loop that adds up gradients of the weight then sums over devices once, and not at every turn.
    """
    axes = _find_row_axes()
    if all(axis_size(name) == 1 for name in axes) or has_partial_gradient(weight):
        return weight
    return jax.reshard(weight, P(*jax.typeof(weight).sharding.spec, reduced=axes))


def gather(shard: jax.Array, names: tuple[str, ...], dim: int, **to) -> jax.Array:
    """A weight made whole along `dim` over mesh axes, on each device. Call it in a shard_map."""
    # XLA wants the dim that a collective works on outermost. On GPUs it lays out the stack of all
    # layers that way. That costs a float32 copy of the stack outside the layers' loop, and one of
    # its gradients (moe:8x7b on 8 H200: 21 GiB). With the layout pinned to the stored one, XLA
    # transposes one layer at a time.
    if dim and habits().pin_layouts:
        shard = with_layout_constraint(shard, Layout(tuple(range(shard.ndim))))
    return jax.lax.all_gather(shard, names, axis=dim, tiled=True, **to)


def find_gathered_axes(
    weight: jax.Array, axes: tuple[str | None, ...]
) -> tuple[int, tuple[str, ...]] | None:
    """(dim of `weight`, mesh axes) that `use_weight` gathers. None if it gathers nothing."""
    mesh = _mesh()
    if mesh is None:
        return None

    stored = jax.typeof(weight).sharding.spec
    for dim, (have, want) in enumerate(zip(stored, used_spec(*axes), strict=False)):
        if have != want and math.prod(mesh.shape[name] for name in _names(have)) > 1:
            return dim, _names(have)
    return None


def has_partial_gradient(weight: jax.Array) -> bool:
    """Whether the gradient of a used weight stays each device's own part of a sum."""
    return _mesh() is not None and bool(jax.typeof(weight).sharding.spec.reduced)


def gradient_spec(weight: jax.Array) -> P | None:
    """How a gradient of a used weight lies on the mesh, None without one.

    That of a gathered weight stays each device's own part of a sum, as `use_weight` tells.
    """
    if _mesh() is None:
        return None
    spec = jax.typeof(weight).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)


def make_zero_gradient(weight: jax.Array) -> jax.Array:
    """Float32 zeros to which gradients of `weight` can be added, laid out by `gradient_spec`."""
    return jnp.zeros(weight.shape, jnp.float32, out_sharding=gradient_spec(weight))


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` times a scalar in the dtype of `x`, where `x` may be each device's own part of a sum."""
    if _mesh() is not None:
        factor = jax.reshard(factor, P(reduced=jax.typeof(x).sharding.spec.unreduced))
    return x * factor.astype(x.dtype)


def scale_gradient(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    """`gradient` times a scalar in float32, see `scale`."""
    return scale(gradient.astype(jnp.float32), factor).astype(gradient.dtype)


def stored_init(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """An initialiser `(key, shape, dtype)` whose result is laid out by the STORED rules."""

    def init_stored(key, shape, dtype=jnp.float32):
        value = init(key, shape, dtype)
        return value if _mesh() is None else jax.reshard(value, make_spec(STORED, axes))

    return init_stored


def lay_out_like(tree, like):
    """Every array of `tree` laid out as its counterpart in `like`, a tree of arrays or types."""
    if _mesh() is None:
        return tree
    return jax.tree.map(lambda x, y: jax.reshard(x, jax.typeof(y).sharding.spec), tree, like)


def lay_out_factors(a: jax.Array, b: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors a [..., in, R] and b [..., R, out] of a matrix, laid out like the matrix.

    Each is cut as `weight` [..., in, out] is along the dims that it shares with it.
    """
    if _mesh() is None:
        return a, b
    *lead, rows, columns = jax.typeof(weight).sharding.spec
    return jax.reshard(a, P(*lead, rows, None)), jax.reshard(b, P(*lead, None, columns))


def relay(tree, change: Callable[[P], P]):
    """Every array of `tree` moved from its layout to the one that `change` returns for it."""
    if _mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.reshard(x, change(jax.typeof(x).sharding.spec)), tree)


def over_stages(tree):
    """Stacks [layers, …] with their layers split over the stages of the pipeline."""
    if axis_size("pipeline") == 1:
        return tree
    return relay(tree, lambda spec: P("pipeline", *spec[1:]))


def off_stages(tree):
    """Stacks [layers, …] with all layers on every stage, so that a scan can run over them."""
    if axis_size("pipeline") == 1:
        return tree
    return relay(tree, lambda spec: P(None, *spec[1:]))


def gather_fsdp(tree):
    """Every array of `tree` whole over the fsdp axes, as ZeRO-1 keeps parameters.

    The arrays stay split over tensor, expert and pipeline.
    """

    def drop(part):
        return None if part == FSDP_AXES or part == STORED["expert_embed"] else part

    return relay(tree, lambda spec: P(*map(drop, spec)))


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`x` reshaped, with the result laid out by `axes`. Splitting a sharded dim needs that."""
    return jax.lax.reshape(x, shape, out_sharding=out_spec(*axes))


def split_dim(x: jax.Array, dim: int, size: int) -> jax.Array:
    """`x` with its dim `dim` split in two, of which the second has `size` entries.

    The first keeps the layout on the mesh. A used weight stays one, with its type of gradient.
    """
    shape = (*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])
    if _mesh() is None:
        return x.reshape(shape)
    spec = jax.typeof(x).sharding.spec
    parts = (*spec.partitions[: dim + 1], None, *spec.partitions[dim + 1 :])
    return jax.lax.reshape(x, shape, out_sharding=P(*parts, reduced=spec.reduced))
