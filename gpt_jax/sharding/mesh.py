"""Meshes with explicit axis types, and where their devices are."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from gpt_jax.config import AXES, slices_problem
from gpt_jax.errors import UsageError
from gpt_jax.sharding.rules import _names


def make_mesh(shape: dict[str, int], devices=None, across: dict[str, int] | None = None) -> Mesh:
    """A mesh with Explicit axis types, from axis sizes by name.

    Absent axes have size 1. `devices` are all devices by default. `across` has the part of each
    size that crosses slices. Inside a slice the last axes get the neighbouring chips. Slices are
    those of the hardware. If the hardware has none, they are equal runs of the device list, which
    on GPUs are hosts. Raises UsageError if the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    across = across or {}
    sizes = tuple((shape or {}).get(axis, 1) for axis in AXES)
    outer = tuple(across.get(axis, 1) for axis in AXES)
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"config.mesh = {shape}: needs {math.prod(sizes)} devices, there are {len(devices)}"
        )

    inner = tuple(size // part for size, part in zip(sizes, outer, strict=True))
    grids = np.stack(
        [
            mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True)
            for part in _slices(devices, across)
        ]
    )

    # Each axis gets its part across slices first and its part inside a slice second.
    pairs = [i for axis in range(len(AXES)) for i in (axis, axis + len(AXES))]
    grid = grids.reshape(*outer, *inner).transpose(pairs)
    return Mesh(grid.reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _slices(devices: list, across: dict[str, int]) -> list[list]:
    """The devices by slice. Raises UsageError if the hardware has other slices than `across`."""
    numbers = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(numbers) > 1:
        if problem := slices_problem(across, len(numbers)):
            raise UsageError(problem)
        return [
            [device for device in devices if device.slice_index == number] for number in numbers
        ]

    count = math.prod(across.values())
    each = len(devices) // count
    return [devices[i * each : (i + 1) * each] for i in range(count)]


def describe_places(mesh: Mesh, devices=None) -> str:
    """Where `devices` are in the mesh, as in "data 0-1, tensor 2".

    `devices` are this process's by default. Axes of size 1 are left out.
    """
    own = {device.id for device in (jax.local_devices() if devices is None else devices)}
    grid = np.vectorize(lambda device: device.id in own)(mesh.devices)
    spans = {
        axis: sorted(set(places.tolist()))
        for axis, places in zip(AXES, np.nonzero(grid), strict=True)
        if mesh.shape[axis] > 1
    }

    def text(at):
        if len(at) > 1 and at[-1] - at[0] == len(at) - 1:
            return f"{at[0]}-{at[-1]}"
        return ",".join(map(str, at))

    return ", ".join(f"{axis} {text(at)}" for axis, at in spans.items())


def make_concrete(abstract, mesh: Mesh):
    """The result of `jax.eval_shape` with concrete shardings on `mesh`, as Orbax needs them.

    Arrays without a sharding, such as scalars, are replicated.
    """

    def concrete(x):
        sharding = getattr(x, "sharding", None)
        spec = P() if sharding is None else sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, abstract)


def join_path(keys) -> str:
    """Joins the keys that `jax.tree_util` gives, as in `blocks/0/attention/q/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def find_unsharded(
    tree, mesh: Mesh, minimum_bytes: int = 1 << 20
) -> dict[str, list[tuple[str, int]]]:
    """{reason: [(path, bytes)]} of the large leaves that every device of `mesh` holds whole.

    A leaf is large from `minimum_bytes` on. The result is empty for a mesh of one device.
    """
    by_reason: dict[str, list[tuple[str, int]]] = {}
    if mesh.size == 1:
        return by_reason

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [name for part in leaf.sharding.spec for name in _names(part)]
        size = leaf.size * leaf.dtype.itemsize
        if size < minimum_bytes or any(mesh.shape[name] > 1 for name in names):
            continue

        reason = "no axis is laid over it"
        if names:
            reason = f"laid over {', '.join(names)}, of size 1 on this mesh"
        by_reason.setdefault(reason, []).append((join_path(path), size))
    return by_reason
