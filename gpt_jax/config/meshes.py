"""Sizes of the mesh's axes: what a config asks for, on so many devices."""

import math
from dataclasses import replace
from itertools import product
from typing import Callable

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


def mesh_shape(mesh: Mesh, devices: int, runs: Callable[[Mesh], bool] = lambda mesh: True) -> dict[str, int]:
    """Axis sizes in mesh order, in-slice times cross-slice, with -1 filled in, for `devices` devices in all.

    Raises UsageError when they do not multiply, with the nearest that do and that `runs` is true of, if any are."""
    within, across = {axis: getattr(mesh, axis) for axis in AXES}, cross_slice(mesh)
    for axis, size in within.items():
        if size == 0:
            raise UsageError(f"config.mesh.{axis} = 0: expected a positive size, or -1 for what is left")
    free = [axis for axis, size in within.items() if size == -1]
    if len(free) > 1:
        raise UsageError(f"config.mesh.{free[1]} = -1: only one axis may be -1, and config.mesh.{free[0]} is; set "
                         f"config.mesh.{free[0]}=1, or another size")
    fixed = math.prod(size for size in within.values() if size > 0) * math.prod(across.values())
    if devices % fixed or (not free and fixed != devices):
        given = {f"config.mesh.{axis}": size for axis, size in within.items() if size not in (1, -1)}
        given |= {f"config.mesh.dcn_{axis}": size for axis, size in across.items() if size != 1}
        given = given or {"config.mesh.data": 1}
        text = ", ".join(f"{name} = {size}" for name, size in given.items())
        raise UsageError(f"{text}: {fixed} does not match {devices} devices; "
                         + _way_out(mesh, given, devices, bool(free), runs))
    return {axis: (devices // fixed if size == -1 else size) * across[axis] for axis, size in within.items()}


def _way_out(mesh: Mesh, given: dict[str, int], devices: int, free: bool, runs: Callable[[Mesh], bool]) -> str:
    """The nearest sizes of the axes that are given that multiply to `devices` (`free`: divide it): fewest axes changed
    first, and of the nearest 50 those that run, if any do."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    fits = lambda sizes: devices % math.prod(sizes) == 0 if free else math.prod(sizes) == devices
    found = [dict(zip(given, sizes)) for sizes in product(divisors, repeat=len(given)) if fits(sizes)]
    changed = lambda sizes: {name: size for name, size in sizes.items() if size != given[name]}
    found.sort(key=lambda sizes: (len(changed(sizes)), sum(abs(math.log(sizes[n] / given[n])) for n in given)))
    as_mesh = lambda sizes: replace(mesh, **{name.split(".")[-1]: size for name, size in sizes.items()})
    near = [sizes for sizes in found[:50] if runs(as_mesh(sizes))] or found
    offers = [" ".join(f"{name}={size}" for name, size in changed(sizes).items()) for sizes in near[:3]]
    return f"the nearest that do: {' or '.join(offers)}"
