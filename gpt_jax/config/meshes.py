"""Sizes of the mesh's axes: what a config asks for, on so many devices."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

from gpt_jax.config.run_fields import Mesh
from gpt_jax.errors import UsageError

# The axis with the slowest links comes first, and tensor lies on the fastest.
AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
# Axes that split the rows of a batch.
BATCH_AXES = ("pipeline", "data", "fsdp", "expert")
# Axes of rows whose devices can have all weights whole: those of fsdp have them with mesh.zero = 1.
COPY_AXES = ("data", "fsdp")
# Axes that split the embed axis of weights.
FSDP_AXES = ("fsdp", "expert", "context")

# A refused mesh gets a few offers. So many of the nearest ones are tried for them.
MOST_TRIED = 50
MOST_OFFERS = 3


def cross_slice(mesh: Mesh) -> dict[str, int]:
    """The sizes across slices, in mesh order."""
    return {axis: getattr(mesh, f"dcn_{axis}") for axis in AXES}


def slices_problem(across: dict[str, int], slices: int) -> str:
    """Says why a mesh of these sizes across slices does not lie over `slices`.

    The answer is "" if it does.
    """
    count = math.prod(across.values())
    if count == slices:
        return ""
    return (
        f"config.mesh.dcn_…: the cross-slice sizes multiply to {count}, "
        f"and there are {slices} slices; as in config.mesh.dcn_data={slices}"
    )


def least_devices(mesh: Mesh) -> int:
    """The fewest devices of the mesh: the product of its sizes, where -1 counts as 1."""
    inside = math.prod(max(1, getattr(mesh, axis)) for axis in AXES)
    return inside * math.prod(cross_slice(mesh).values())


def mesh_shape(
    mesh: Mesh, devices: int, runs: Callable[[Mesh], bool] = lambda mesh: True
) -> dict[str, int]:
    """The sizes of the axes on so many devices, in mesh order.

    A size is the one inside a slice times the one across slices, with -1 filled in. Raises
    UsageError if the sizes do not multiply to `devices`. It names the nearest meshes that do and
    for which `runs` is true.
    """
    within = {axis: getattr(mesh, axis) for axis in AXES}
    across = cross_slice(mesh)
    for axis, size in within.items():
        if size == 0:
            raise UsageError(
                f"config.mesh.{axis} = 0: expected a positive size, or -1 for what is left"
            )
    free = [axis for axis, size in within.items() if size == -1]
    if len(free) > 1:
        raise UsageError(
            f"config.mesh.{free[1]} = -1: only one axis may be -1, and config.mesh.{free[0]} is; "
            f"set config.mesh.{free[0]}=1, or another size"
        )

    fixed = math.prod(size for size in within.values() if size > 0) * math.prod(across.values())
    if devices % fixed or (not free and fixed != devices):
        sizes = _chosen_sizes(within, across)
        text = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        way_out = _way_out(mesh, sizes, devices, bool(free), runs)
        raise UsageError(f"{text}: a mesh of {fixed} does not match {devices} devices; {way_out}")

    rest = devices // fixed
    return {axis: (rest if size == -1 else size) * across[axis] for axis, size in within.items()}


def _chosen_sizes(within: dict[str, int], across: dict[str, int]) -> dict[str, int]:
    """The sizes that are not 1 or -1, by the name of their field."""
    sizes = {f"config.mesh.{axis}": size for axis, size in within.items() if size not in (1, -1)}
    sizes |= {f"config.mesh.dcn_{axis}": size for axis, size in across.items() if size != 1}
    return sizes or {"config.mesh.data": 1}


def _way_out(
    mesh: Mesh, sizes: dict[str, int], devices: int, is_free: bool, runs: Callable[[Mesh], bool]
) -> str:
    """Names the nearest sizes that multiply to `devices`, or divide it if an axis is free.

    Meshes for which `runs` is true come first, if any of those that are tried is.
    """

    def is_running(change):
        return runs(replace(mesh, **{name.split(".")[-1]: size for name, size in change.items()}))

    across = {name: size for name, size in sizes.items() if ".dcn_" in name}
    within = {name: size for name, size in sizes.items() if name not in across}
    plain = {f"config.mesh.{axis}": 1 for axis in ("data", "fsdp") if getattr(mesh, axis) == 1}

    # The machine decides the sizes across slices, so those change only when nothing else helps.
    inside, rest = divmod(devices, math.prod(across.values()))
    attempts = []
    if not rest:
        attempts.append(_nearest(within, inside, is_free))
        attempts.append(_nearest(plain | within, inside, is_free))
    if across:
        attempts.append(_nearest(sizes, devices, is_free))

    for changes in attempts:
        running = [change for change in changes if is_running(change)]
        if running:
            return f"the nearest that do: {_offer(running)}"
    changes = next(filter(None, attempts))
    return f"the nearest that do: {_offer(changes)}, but the config runs on none of them"


def _offer(changes: list[dict[str, int]]) -> str:
    """The first few changes as flags."""
    offers = []
    for change in changes[:MOST_OFFERS]:
        offers.append(" ".join(f"{name}={size}" for name, size in change.items()))
    return " or ".join(offers)


def _nearest(sizes: dict[str, int], devices: int, is_free: bool) -> list[dict[str, int]]:
    """The MOST_TRIED nearest of `_changes`, with the fewest changed axes first."""

    def distance(change):
        return sum(abs(math.log(size / sizes[name])) for name, size in change.items())

    nearest = []
    for count in range(1, len(sizes) + 1):
        if len(nearest) < MOST_TRIED:
            nearest += sorted(_changes(sizes, devices, is_free, count), key=distance)
    return nearest[:MOST_TRIED]


def _changes(
    sizes: dict[str, int], devices: int, is_free: bool, count: int
) -> list[dict[str, int]]:
    """All other sizes of `count` of the axes, with which the whole mesh fits the devices."""
    divisors = [number for number in range(1, devices + 1) if devices % number == 0]
    whole = math.prod(sizes.values())

    changes = []
    for names in combinations(sizes, count):
        rest = whole // math.prod(sizes[name] for name in names)
        choices = [[size for size in divisors if size != sizes[name]] for name in names]
        for new_sizes in product(*choices):
            total = rest * math.prod(new_sizes)
            fits = devices % total == 0 if is_free else total == devices
            if fits:
                changes.append(dict(zip(names, new_sizes, strict=True)))
    return changes
