"""Sizes of the mesh's axes: what a config asks for, on so many devices."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

from gpt_jax.config.run_fields import Mesh
from gpt_jax.errors import UsageError

AXES = (
    "pipeline",
    "data",
    "fsdp",
    "expert",
    "context",
    "tensor",
)  # slowest links first, tensor on the fastest
BATCH_AXES = ("pipeline", "data", "fsdp", "expert")  # that split the rows of a batch
FSDP_AXES = ("fsdp", "expert", "context")  # that split the weights' embed axis
NEAREST = 50  # meshes that are looked at before three are offered


def cross_slice(mesh: Mesh) -> dict[str, int]:
    """Sizes across slices, in mesh order."""
    return {axis: getattr(mesh, f"dcn_{axis}") for axis in AXES}


def slices_problem(across: dict[str, int], slices: int) -> str:
    """Why a mesh of these sizes across slices does not lie over so many; "" where it does."""
    count = math.prod(across.values())
    if count == slices:
        return ""
    return (
        f"config.mesh.dcn_…: the cross-slice sizes multiply to {count}, and there are {slices} "
        "slices; as in "
        f"config.mesh.dcn_data={slices}"
    )


def least_devices(mesh: Mesh) -> int:
    """The product of the sizes that are given: the devices of the mesh when -1 stands for 1."""
    return math.prod(max(1, getattr(mesh, axis)) for axis in AXES) * math.prod(
        cross_slice(mesh).values()
    )


def mesh_shape(
    mesh: Mesh, devices: int, runs: Callable[[Mesh], bool] = lambda mesh: True
) -> dict[str, int]:
    """Axis sizes in mesh order, in-slice times cross-slice, with -1 filled in, for `devices`
    devices in all.

    Raises UsageError when they do not multiply, with the nearest that do and that `runs` is true
    of, if any are."""
    within, across = {axis: getattr(mesh, axis) for axis in AXES}, cross_slice(mesh)
    for axis, size in within.items():
        if size == 0:
            raise UsageError(
                f"config.mesh.{axis} = 0: expected a positive size, or -1 for what is left"
            )
    free = [axis for axis, size in within.items() if size == -1]
    if len(free) > 1:
        raise UsageError(
            f"config.mesh.{free[1]} = -1: only one axis may be -1, and config.mesh.{free[0]} is; "
            "set "
            f"config.mesh.{free[0]}=1, or another size"
        )
    fixed = math.prod(size for size in within.values() if size > 0) * math.prod(across.values())
    if devices % fixed or (not free and fixed != devices):
        given = {
            f"config.mesh.{axis}": size for axis, size in within.items() if size not in (1, -1)
        }
        given |= {f"config.mesh.dcn_{axis}": size for axis, size in across.items() if size != 1}
        given = given or {"config.mesh.data": 1}
        text = ", ".join(f"{name} = {size}" for name, size in given.items())
        raise UsageError(
            f"{text}: {fixed} does not match {devices} devices; "
            + _way_out(mesh, given, devices, bool(free), runs)
        )
    return {
        axis: (devices // fixed if size == -1 else size) * across[axis]
        for axis, size in within.items()
    }


def _way_out(
    mesh: Mesh, given: dict[str, int], devices: int, free: bool, runs: Callable[[Mesh], bool]
) -> str:
    """The nearest sizes that multiply to `devices` (`free`: divide it) and that run, if any of
    50 do: of the axes that are given, of data and fsdp besides; those across slices, which the
    machine decides, last."""

    def as_mesh(sizes):
        return replace(mesh, **{name.split(".")[-1]: size for name, size in sizes.items()})

    across = {name: size for name, size in given.items() if ".dcn_" in name}
    within = {name: size for name, size in given.items() if name not in across}
    plain = {f"config.mesh.{axis}": 1 for axis in ("data", "fsdp") if getattr(mesh, axis) == 1}
    inside, rest = divmod(devices, math.prod(across.values()))
    tried = [_nearest(axes, 0 if rest else inside, free) for axes in (within, plain | within)]
    tried += [_nearest(given, devices, free)] * bool(across)
    runs_of = ([sizes for sizes in near if runs(as_mesh(sizes))] for near in tried)
    run = next(filter(None, runs_of), [])
    near = run or next(filter(None, tried))
    offers = [" ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in near[:3]]
    return (
        f"the nearest that do: {' or '.join(offers)}"
        + ", but as it is the config runs on none of them" * (not run)
    )


def _nearest(given: dict[str, int], devices: int, free: bool) -> list[dict[str, int]]:
    """Up to 50 of `_changes`, fewest axes changed first."""
    found = []
    for count in range(1, len(given) + 1):
        if len(found) < NEAREST:
            found += sorted(
                _changes(given, devices, free, count),
                key=lambda sizes: sum(
                    abs(math.log(size / given[name])) for name, size in sizes.items()
                ),
            )
    return found[:NEAREST]


def _changes(given: dict[str, int], devices: int, free: bool, count: int) -> list[dict[str, int]]:
    """New sizes of `count` of the axes."""
    fits = (lambda size: devices % size == 0) if free else (lambda size: size == devices)
    divisors, whole, found = (
        [n for n in range(1, devices + 1) if devices % n == 0],
        math.prod(given.values()),
        [],
    )
    for names in combinations(given, count):
        rest = whole // math.prod(given[name] for name in names)
        choices = [[n for n in divisors if n != given[name]] for name in names]
        found += [
            dict(zip(names, sizes, strict=False))
            for sizes in product(*choices)
            if fits(rest * math.prod(sizes))
        ]
    return found
