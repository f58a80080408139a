"""Sizes of the mesh's axes: what a config asks for, on so many devices."""

import math

from gpt_jax.config.fields import Mesh
from gpt_jax.errors import UsageError

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")  # slowest links first, tensor on the fastest
BATCH_AXES = ("pipeline", "data", "fsdp", "expert")  # that split the rows of a batch
FSDP_AXES = ("fsdp", "expert", "context")  # that split the weights' embed axis


def cross_slice(mesh: Mesh) -> dict[str, int]:
    """Sizes across slices, in mesh order."""
    return {axis: getattr(mesh, f"dcn_{axis}") for axis in AXES}


def least_devices(mesh: Mesh) -> int:
    """The product of the sizes that are given: the devices of the mesh when -1 stands for 1."""
    return math.prod(max(1, getattr(mesh, axis)) for axis in AXES) * math.prod(cross_slice(mesh).values())


def mesh_shape(mesh: Mesh, devices: int) -> dict[str, int]:
    """Axis sizes in mesh order, in-slice times cross-slice, with -1 filled in, for `devices` devices in all.

    Raises UsageError when they do not multiply, with the nearest sizes that do."""
    within, across = {axis: getattr(mesh, axis) for axis in AXES}, cross_slice(mesh)
    for axis, size in within.items():
        if size == 0:
            raise UsageError(f"config.mesh.{axis} = 0: expected a positive size, or -1 for what is left")
    free = [axis for axis, size in within.items() if size == -1]
    if len(free) > 1:
        raise UsageError(f"config.mesh.{free[1]} = -1: only one axis may be -1, and config.mesh.{free[0]} is")
    fixed = math.prod(size for size in within.values() if size > 0) * math.prod(across.values())
    if devices % fixed or (not free and fixed != devices):
        axes = [f"config.mesh.{axis} = {size}" for axis, size in within.items() if size not in (1, -1)]
        axes += [f"config.mesh.dcn_{axis} = {size}" for axis, size in across.items() if size != 1]
        raise UsageError(f"{', '.join(axes) or 'config.mesh.data = 1'}: {fixed} does not match {devices} devices; "
                         + _way_out(within, across, devices, fixed, bool(free)))
    return {axis: (devices // fixed if size == -1 else size) * across[axis] for axis, size in within.items()}


def _way_out(within: dict, across: dict, devices: int, fixed: int, free: bool) -> str:
    """The changes of one axis that fit, nearest first; else of all."""
    offers = []
    for name, size in [*within.items(), *((f"dcn_{axis}", size) for axis, size in across.items())]:
        others = fixed // size if size > 0 else 0
        if size > 1 and devices % others == 0:
            fits = [n for n in range(1, devices // others + 1) if (devices // others) % n == 0] if free else \
                [devices // others]
            offers += [(abs(math.log(n / size)), f"config.mesh.{name}={n}") for n in fits if n != size]
    nearest = [text for _, text in sorted(offers)[:3]]
    if nearest:
        return f"the nearest that do: {' or '.join(nearest)}"
    return "set one axis to -1 or make the product equal"
