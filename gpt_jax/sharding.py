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
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax.config import AXES, BATCH_AXES, FSDP_AXES, slices_problem
from gpt_jax.errors import UsageError

# Logical axis -> mesh axes. A name that is in neither table is a KeyError, never "replicated".
STORED = {
    "layers": None,
    "vocab": "tensor",
    "embed": FSDP_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": ("fsdp", "context"),
    "position": None,
    "scale": None,
    "gate": None,
}
USED = STORED | {
    "embed": None,
    "expert_embed": None,
    "batch": BATCH_AXES,
    "seq": "context",
    "keys": None,
    "head_dim": None,
    "stream": ("context", "tensor"),
    "stages": "pipeline",
}


def make_mesh(shape: dict[str, int], devices=None, across: dict[str, int] | None = None) -> Mesh:
    """A mesh with Explicit axis types from axis sizes by name (absent axes are 1); devices default
    to all.

    `across`: the part of each size that crosses slices. Inside a slice the last axes get the
    neighbouring chips; slices are those of the hardware, else equal runs of the device list
    (hosts, for GPUs). UsageError for sizes that do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes, outer = (tuple((sizes or {}).get(axis, 1) for axis in AXES) for sizes in (shape, across))
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"config.mesh = {shape}: needs {math.prod(sizes)} devices, there are {len(devices)}"
        )
    inner = tuple(size // part for size, part in zip(sizes, outer))
    slices = _slices(devices, across or {})
    grids = np.stack(
        [
            mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
            for part in slices
        ]
    )
    grid = grids.reshape(*outer, *inner).transpose(
        [i for axis in range(len(AXES)) for i in (axis, axis + len(AXES))]
    )
    return Mesh(grid.reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _slices(devices: list, across: dict[str, int]) -> list[list]:
    """The devices by slice."""
    numbers, count = (
        sorted({getattr(device, "slice_index", 0) for device in devices}),
        math.prod(across.values()),
    )
    if len(numbers) > 1:
        if problem := slices_problem(across, len(numbers)):
            raise UsageError(problem)
        return [
            [device for device in devices if device.slice_index == number] for number in numbers
        ]
    each = len(devices) // count
    return [devices[i * each : (i + 1) * each] for i in range(count)]


def places(mesh: Mesh, devices=None) -> str:
    """Where `devices` (default: this process's) are in the mesh: "data 0-1, tensor 2", axes
    longer than 1 alone."""
    own = {device.id for device in (jax.local_devices() if devices is None else devices)}
    grid = np.vectorize(lambda device: device.id in own)(mesh.devices)
    spans = {
        axis: sorted(set(found.tolist()))
        for axis, found in zip(AXES, np.nonzero(grid))
        if mesh.shape[axis] > 1
    }

    def text(at):
        return (
            f"{at[0]}-{at[-1]}"
            if len(at) > 1 and at[-1] - at[0] == len(at) - 1
            else ",".join(map(str, at))
        )

    return ", ".join(f"{axis} {text(at)}" for axis, at in spans.items())


def _mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


# What `using` has changed of USED, during the trace of a function.
_CHANGED: ContextVar[dict] = ContextVar("changed", default={})
STAGE = {
    "batch": ("data", "fsdp", "expert")
}  # inside a pipeline stage, where `pipeline` lays out the stages
WHOLE_ROWS = {"seq": None, "stream": None}  # where a sequence is not split: decoding


@contextmanager
def using(changes: dict):
    """USED with `changes`, for what is traced inside. Enter it in the traced function itself,
    never around a call of a jitted one: it is no part of a compiled function's key."""
    token = _CHANGED.set(_CHANGED.get() | changes)
    try:
        yield
    finally:
        _CHANGED.reset(token)


def spec(table: dict, axes: tuple[str | None, ...]) -> P:
    """The PartitionSpec of logical `axes`; two axes on one mesh axis raise ValueError, unknown
    names KeyError."""
    parts = [table[axis] if axis is not None else None for axis in axes]
    used = [name for part in parts for name in _names(part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} would use a mesh axis twice: {parts}")
    return P(*parts)


def used(*axes: str | None) -> P:
    """The PartitionSpec of logical `axes` where they are computed with."""
    return spec(USED | _CHANGED.get(), axes)


def platform() -> str:
    """What the program is compiled for: the platform of the mesh, which need not be this
    process's."""
    device = _abstract_device()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """The kind of device that the program is compiled for (devices.py)."""
    device = _abstract_device()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def _abstract_device():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device


def axis_size(axis: str) -> int:
    """Devices along mesh axis `axis` of the current mesh (1 without a mesh)."""
    mesh = _mesh()
    return 1 if mesh is None else mesh.shape[axis]


def parts(axis: str) -> int:
    """Pieces into which logical `axis` is cut where it is computed with (1 without a mesh)."""
    return math.prod(map(axis_size, _names((USED | _CHANGED.get())[axis])))


def batch_spec() -> P:
    """How a column [B, T] of a batch lies on the mesh."""
    return P(BATCH_AXES, "context")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the USED rules; the layout of an activation, stated where it is made."""
    return x if _mesh() is None else jax.reshard(x, used(*axes))


def use(weight: jax.Array, axes: tuple[str | None, ...], dtype) -> jax.Array:
    """A stored weight, cast to the compute dtype first and gathered over fsdp second (half the
    bytes on the wire). What is gathered is typed as `reduced` over the axes of rows and tokens:
    its gradient stays each device's own part of a sum until it is scattered to where the weight
    is stored, in one go, where a plain reshard sums whole gradients on every device. Not under
    the vmap of a pipeline's stages, which JAX 0.10 refuses."""
    weight = weight.astype(dtype)
    where = gathered_axes(weight, axes)
    if where is None or _CHANGED.get():
        return constrain(weight, *axes)
    dim, names = where
    rows = {name for part in used("batch", "seq") for name in _names(part)}
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


def gathered_axes(
    weight: jax.Array, axes: tuple[str | None, ...]
) -> tuple[int, tuple[str, ...]] | None:
    """(dim of `weight`, mesh axes) that a use of it gathers; None: nothing."""
    mesh = _mesh()
    if mesh is None:
        return None
    for dim, (have, want) in enumerate(zip(jax.typeof(weight).sharding.spec, used(*axes))):
        if have != want and math.prod(mesh.shape[name] for name in _names(have)) > 1:
            return dim, _names(have)
    return None


def is_gathered(weight: jax.Array) -> bool:
    """Whether `use` has gathered it."""
    return _mesh() is not None and bool(jax.typeof(weight).sharding.spec.reduced)


def _names(part) -> tuple[str, ...]:
    """The mesh axes of one dim of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def out(*axes: str | None) -> P | None:
    """`out_sharding` for jnp operations: the USED spec on a mesh, None without one."""
    return None if _mesh() is None else used(*axes)


def stored(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """An initialiser `(key, shape, dtype)` whose result is laid out by the STORED rules."""

    def made(key, shape, dtype=jnp.float32):
        value = init(key, shape, dtype)
        return value if _mesh() is None else jax.reshard(value, spec(STORED, axes))

    return made


def lay_out(tree, like):
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


def whole(tree):
    """Every array of `tree` without the fsdp axes: each copy of the model holds it whole but for
    tensor, expert and pipeline (what ZeRO-1 keeps of parameters)."""

    def drop(part):
        return None if part == FSDP_AXES or part == STORED["expert_embed"] else part

    return relay(tree, lambda spec: P(*map(drop, spec)))


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`x` reshaped, with the layout of the result stated (splitting a sharded dim needs it)."""
    return jax.lax.reshape(x, shape, out_sharding=out(*axes))


def local(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """`fn` run on each device's own shard (jax.shard_map). `in_axes`: the logical axes of each
    argument, which is laid out by the USED rules first, or None for an argument that is None;
    `out_axes`: of the result, or a tuple of them."""
    if _mesh() is None:
        return fn

    def as_spec(axes):
        return P() if axes is None else used(*axes)

    many = isinstance(out_axes[0], tuple)
    specs = (
        tuple(map(as_spec, in_axes)),
        tuple(map(as_spec, out_axes)) if many else as_spec(out_axes),
    )
    mapped = jax.shard_map(fn, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    if _CHANGED.get().items() >= STAGE.items():
        mapped = _by_stage(fn, mapped, *specs)

    def run(*args):
        return mapped(
            *(
                x if axes is None else constrain(x, *axes)
                for x, axes in zip(args, in_axes, strict=True)
            )
        )

    return run


def _by_stage(fn: Callable, mapped: Callable, in_specs: tuple, out_specs) -> Callable:
    """`mapped` (`fn` on shards) for the vmap over a pipeline's stages, of which each device has
    one. Left to itself the vmap of a shard_map (JAX 0.10) gathers every argument over the
    stages, and leaves out the axis pipeline, which what runs on single devices only (Pallas
    kernels, ragged collectives) does not bear."""
    run, over = jax.custom_batching.custom_vmap(mapped), lambda spec: P("pipeline", *spec)

    @run.def_vmap
    def staged(size, batched, *args):
        def one(*args):
            own = (x[0] if many else x for x, many in zip(args, batched))
            return jax.tree.map(lambda y: y[None], fn(*own))

        specs = tuple(over(spec) if many else spec for spec, many in zip(in_specs, batched))
        out = jax.tree.map(over, out_specs, is_leaf=lambda x: isinstance(x, P))
        found = jax.shard_map(one, in_specs=specs, out_specs=out, check_vma=False)(*args)
        return found, jax.tree.map(lambda _: True, found)

    return run


def concrete(abstract, mesh: Mesh):
    """eval_shape's result with concrete shardings on `mesh` (scalars replicated), as Orbax needs
    them."""

    def one(x):
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, P() if sharding is None else sharding.spec),
        )

    return jax.tree.map(one, abstract)


def unsharded(tree, mesh: Mesh, minimum_bytes: int = 1 << 20) -> dict[str, list[tuple[str, int]]]:
    """Why -> (path, bytes) of the leaves of at least `minimum_bytes` that no axis of `mesh`, of
    several devices, splits."""
    found: dict[str, list[tuple[str, int]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [name for part in leaf.sharding.spec for name in _names(part)]
        if (
            mesh.size > 1
            and leaf.size * leaf.dtype.itemsize >= minimum_bytes
            and all(mesh.shape[n] == 1 for n in names)
        ):
            why = (
                f"laid over {', '.join(names)}, of size 1 on this mesh"
                if names
                else "no axis is laid over it"
            )
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.setdefault(why, []).append((name, leaf.size * leaf.dtype.itemsize))
    return found
