"""Meshes, and the rules that lay logical axes over them (floor 0). What reshards lives here.

Weights have two layouts. They are *stored* split over `fsdp` (and whatever else repeats the model:
ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054) and `tensor`, layers over `pipeline`, and *used*
split over `tensor` alone (Shoeybi et al. 2019, arXiv:1909.08053): `use` casts and gathers a weight
where it is multiplied, and its transpose scatters the gradient. The mesh has Explicit axis types,
so a wrong layout is an error at trace time. Without a mesh (`jax.set_mesh` not called) every helper
is the identity.
"""

import math
from collections.abc import Callable

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
    make_spec,
    out_spec,
    platform,
    used_spec,
)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the USED rules; the layout of an activation, stated where it is made."""
    return x if _mesh() is None else jax.reshard(x, used_spec(*axes))


def use_weight(weight: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """A stored weight, cast to the compute dtype first and gathered over fsdp second (half the
    bytes on the wire). What is gathered is typed as `reduced` over the axes of rows and tokens:
    its gradient stays each device's own part of a sum until it is scattered to where the weight
    is stored, in one go, where a plain reshard sums whole gradients on every device. Not under
    the vmap of a pipeline's stages, which JAX 0.10 refuses."""
    weight = weight.astype(dtype)
    where = find_gathered_axes(weight, axes)
    if where is None or _CHANGED.get():
        return constrain(weight, *axes)
    dim, names = where
    rows = {name for part in used_spec("batch", "seq") for name in _names(part)}
    spec = jax.typeof(weight).sharding.spec
    given = P(*spec, reduced=rows - set(names))
    out = P(*(None if i == dim else part for i, part in enumerate(spec)), reduced=rows)
    return jax.shard_map(
        lambda w: gather(w, names, dim, to="reduced"), in_specs=given, out_specs=out
    )(jax.reshard(weight, given))


def gather(shard: jax.Array, names: tuple[str, ...], dim: int, **to) -> jax.Array:
    """A weight made whole along `dim` over mesh axes, on each device (inside a jax.shard_map).
    XLA wants the dim that a collective works on outermost, and on GPUs lays out the stack of all
    layers so, which costs a float32 copy of it outside the layers' loop and one of its gradients
    (moe:8x7b on 8 H200: 21 GiB); there the shard and its gradient keep the layout that they are
    stored in, and one layer at a time is transposed."""
    if dim and platform() == "gpu":
        shard = with_layout_constraint(shard, Layout(tuple(range(shard.ndim))))
    return jax.lax.all_gather(shard, names, axis=dim, tiled=True, **to)


def find_gathered_axes(
    weight: jax.Array, axes: tuple[str | None, ...]
) -> tuple[int, tuple[str, ...]] | None:
    """(dim of `weight`, mesh axes) that a use of it gathers; None: nothing."""
    mesh = _mesh()
    if mesh is None:
        return None
    for dim, (have, want) in enumerate(zip(jax.typeof(weight).sharding.spec, used_spec(*axes))):
        if have != want and math.prod(mesh.shape[name] for name in _names(have)) > 1:
            return dim, _names(have)
    return None


def is_gathered(weight: jax.Array) -> bool:
    """Whether `use` has gathered it."""
    return _mesh() is not None and bool(jax.typeof(weight).sharding.spec.reduced)


def stored_init(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """An initialiser `(key, shape, dtype)` whose result is laid out by the STORED rules."""

    def made(key, shape, dtype=jnp.float32):
        value = init(key, shape, dtype)
        return value if _mesh() is None else jax.reshard(value, make_spec(STORED, axes))

    return made


def lay_out_like(tree, like):
    """Every array of `tree` laid out as its counterpart in `like` (arrays or their abstract
    values)."""
    return (
        tree
        if _mesh() is None
        else jax.tree.map(lambda x, y: jax.reshard(x, jax.typeof(y).sharding.spec), tree, like)
    )


def relay(tree, change: Callable[[P], P]):
    """Every array of `tree` moved from its layout to `change` of it."""
    if _mesh() is None:
        return tree
    return jax.tree.map(lambda x: jax.reshard(x, change(jax.typeof(x).sharding.spec)), tree)


def over_stages(tree):
    """Stacks [layers, …] with their layers over the stages of the pipeline."""
    return (
        tree if axis_size("pipeline") == 1 else relay(tree, lambda spec: P("pipeline", *spec[1:]))
    )


def off_stages(tree):
    """Stacks [layers, …] with all layers on every stage, to be scanned over."""
    return tree if axis_size("pipeline") == 1 else relay(tree, lambda spec: P(None, *spec[1:]))


def gather_fsdp(tree):
    """Every array of `tree` without the fsdp axes: each copy of the model holds it whole but for
    tensor, expert and pipeline (what ZeRO-1 keeps of parameters)."""

    def drop(part):
        return None if part == FSDP_AXES or part == STORED["expert_embed"] else part

    return relay(tree, lambda spec: P(*map(drop, spec)))


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`x` reshaped, with the layout of the result stated (splitting a sharded dim needs it)."""
    return jax.lax.reshape(x, shape, out_sharding=out_spec(*axes))
