"""Meshes, and the rules that lay logical axes over them (floor 0). What reshards lives here.

Weights have two layouts. They are *stored* sharded over `fsdp` and `tensor` (ZeRO-3: Rajbhandari et al. 2020,
arXiv:1910.02054) and *used* sharded over `tensor` alone (Shoeybi et al. 2019, arXiv:1909.08053): `use` casts and
gathers a weight where it is multiplied, and its transpose scatters the gradient. The mesh has Explicit axis types, so a
wrong layout is an error at trace time. Without a mesh (`jax.set_mesh` not called) every helper is the identity.
"""

import math
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from gpt_jax.errors import UsageError

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")  # slowest links first, tensor on the fastest
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. A name that is in neither table is a KeyError, never "replicated".
STORED = {"layers": None, "vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
          "position": None, "scale": None, "gate": None}
USED = STORED | {"embed": None, "batch": BATCH_AXES, "seq": None, "keys": None, "head_dim": None}


def make_mesh(shape: dict[str, int], devices=None) -> Mesh:
    """A mesh with Explicit axis types from axis sizes by name (absent axes are 1); devices default to all."""
    devices = jax.devices() if devices is None else devices
    sizes = tuple(shape.get(axis, 1) for axis in AXES)
    if math.prod(sizes) != len(devices):
        raise UsageError(f"config.mesh = {shape}: needs {math.prod(sizes)} devices, there are {len(devices)}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def _mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def spec(table: dict, axes: tuple[str | None, ...]) -> P:
    """The PartitionSpec of logical `axes`; two axes on one mesh axis raise ValueError, unknown names KeyError."""
    parts = [table[axis] if axis is not None else None for axis in axes]
    used = [name for part in parts if part is not None for name in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} would use a mesh axis twice: {parts}")
    return P(*parts)


def axis_size(axis: str) -> int:
    """Devices along mesh axis `axis` of the current mesh (1 without a mesh)."""
    mesh = _mesh()
    return 1 if mesh is None else mesh.shape[axis]


def batch_spec() -> P:
    """How a [B, ...] batch lies on the mesh."""
    return P(BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the USED rules; the layout of an activation, stated where it is made."""
    return x if _mesh() is None else jax.reshard(x, spec(USED, axes))


def use(weight: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """A stored weight, cast to the compute dtype first and gathered over fsdp second (half the bytes on the wire)."""
    return constrain(weight.astype(dtype), *axes)


def out(*axes: str | None) -> P | None:
    """`out_sharding` for jnp operations: the USED spec on a mesh, None without one."""
    return None if _mesh() is None else spec(USED, axes)


def stored(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """An initialiser `(key, shape, dtype)` whose result is laid out by the STORED rules."""

    def made(key, shape, dtype=jnp.float32):
        value = init(key, shape, dtype)
        return value if _mesh() is None else jax.reshard(value, spec(STORED, axes))

    return made


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`x` reshaped, with the layout of the result stated (splitting a sharded dim needs it)."""
    return jax.lax.reshape(x, shape, out_sharding=out(*axes))


def local(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """`fn` run on each device's own shard (jax.shard_map). `in_axes`: the logical axes of each argument, which is laid
    out by the USED rules first, or None for an argument that is None; `out_axes`: of the result, or a tuple of them."""
    if _mesh() is None:
        return fn
    as_spec = lambda axes: P() if axes is None else spec(USED, axes)
    many = isinstance(out_axes[0], tuple)
    mapped = jax.shard_map(fn, in_specs=tuple(map(as_spec, in_axes)), check_vma=False,
                           out_specs=tuple(map(as_spec, out_axes)) if many else as_spec(out_axes))

    def run(*args):
        return mapped(*(x if axes is None else constrain(x, *axes) for x, axes in zip(args, in_axes, strict=True)))

    return run


def spread(x: jax.Array) -> jax.Array:
    """A stack of matrices [L, in, out] with whole matrices on each device: L over as many mesh axes as divide it."""
    mesh = _mesh()
    if mesh is None:
        return x
    axes, size = [], 1
    for axis in ("fsdp", "tensor", "data"):
        if mesh.shape[axis] > 1 and x.ndim == 3 and x.shape[0] % (size * mesh.shape[axis]) == 0:
            axes, size = [*axes, axis], size * mesh.shape[axis]
    return jax.reshard(x, P(tuple(axes) or None))


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The contiguous rows of a global batch that this process's devices hold."""
    sharding = NamedSharding(mesh, batch_spec())
    slices = sorted({index[0].indices(batch_size)[:2]
                     for index in sharding.addressable_devices_indices_map((batch_size,)).values()})
    start, stop = slices[0][0], slices[-1][1]
    if any(end != begin for (_, end), (begin, _) in zip(slices, slices[1:])):
        raise UsageError("config.mesh: this process's devices hold rows of the batch that are not contiguous; "
                         "put config.mesh.tensor inside a process")
    return slice(start, stop)


def to_devices(mesh: Mesh, columns: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's rows [b, ...] of every column as global arrays [batch_size, ...] on the mesh."""
    sharding = NamedSharding(mesh, batch_spec())
    if sharding.is_fully_addressable:  # all rows are here: one call for all columns, half the time
        return jax.device_put(columns, sharding)
    return {name: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
            for name, value in columns.items()}


def concrete(abstract, mesh: Mesh):
    """eval_shape's result with concrete shardings on `mesh` (scalars replicated), as Orbax needs them."""

    def one(x):
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P() if sharding is None else
                                                                             sharding.spec))

    return jax.tree.map(one, abstract)


def unsharded(tree, minimum_bytes: int = 1 << 20) -> list[str]:
    """Paths of leaves of at least `minimum_bytes` that no mesh axis splits although the mesh has several devices."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.size * leaf.dtype.itemsize >= minimum_bytes and leaf.sharding.is_fully_replicated and \
                len(leaf.sharding.device_set) > 1:
            found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return found
