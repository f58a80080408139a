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


def describe_places(mesh: Mesh, devices=None) -> str:
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


def make_concrete(abstract, mesh: Mesh):
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


def find_unsharded(
    tree, mesh: Mesh, minimum_bytes: int = 1 << 20
) -> dict[str, list[tuple[str, int]]]:
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
