"""Which devices talk to each other in a collective, and along which axes of the mesh."""

import itertools
import math
import re

import numpy as np

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


def read_groups(rest: str) -> np.ndarray | None:
    """Returns the groups of an instruction, one row a group, or None if it names none.

    `rest` is the text of its attributes. The rows of a permute are its (source, target) pairs.
    """
    iota = _IOTA.search(rest)
    if iota:
        return _order_devices(iota[2], iota[3]).reshape(_split_numbers(iota[1]))

    axes = _AXES.search(rest)
    if axes:
        return _read_axes(*axes.groups())

    listed = _GROUPS.search(rest) or _PAIRS.search(rest)
    if not listed:
        return None
    rows = re.findall(r"\{([\d, ]+)\}", listed[1])
    return np.array([_split_numbers(row) for row in rows])


def _split_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _order_devices(dims: str, order: str | None) -> np.ndarray:
    """Returns the devices 0, 1, … laid out as `dims` and transposed to `order`, as in "1,0"."""
    sizes = _split_numbers(dims)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_split_numbers(order)) if order else devices


def _read_axes(mesh: str, numbers: str | None, chosen: str) -> np.ndarray:
    """Returns groups over axes of a mesh that XLA made for itself.

    `mesh` reads `'a'=8,'b'=4` and `chosen` reads `'a','b'`. A part of an axis reads `'a':(2)4`,
    which is the middle one of its parts (2, 4, 1). `numbers` are the devices of the mesh, as
    `[4,8]T(1,0)` or as a list. Without them the devices are in order.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    whole = set(re.findall(r"'([^']+)'(?!:)", chosen))
    parts = re.findall(r"'([^']+)':\((\d+)\)(\d+)", chosen)

    # Every axis is cut where a chosen part of it begins or ends, so that each piece of it is either
    # chosen or not.
    shape = []
    is_chosen = []
    for name, size in sizes.items():
        ranges = [(int(low), int(low) * int(n)) for axis, low, n in parts if axis == name]
        cuts = sorted({1, size, *itertools.chain(*ranges)})
        for low, high in itertools.pairwise(cuts):
            shape.append(high // low)
            is_inside = any(start <= low and high <= end for start, end in ranges)
            is_chosen.append(name in whole or is_inside)

    devices = _number_devices(numbers, math.prod(shape)).reshape(shape)
    outer = [place for place, chosen in enumerate(is_chosen) if not chosen]
    inner = [place for place, chosen in enumerate(is_chosen) if chosen]
    members = math.prod(shape[place] for place in inner)
    return devices.transpose(outer + inner).reshape(-1, members)


def _number_devices(numbers: str | None, count: int) -> np.ndarray:
    """Returns the devices of a mesh, as `numbers` list them."""
    if not numbers:
        return np.arange(count)
    order = _ORDER.search(numbers)
    if order:
        return _order_devices(order[1], order[2]).ravel()
    return np.array(_split_numbers(numbers))


def find_axes(members: np.ndarray | None, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the members of the groups differ.

    Devices are numbered in the order of the mesh. Without groups all devices talk to each other.
    """
    if members is None:
        return tuple(axis for axis, size in mesh_shape.items() if size > 1)

    places = np.unravel_index(members, tuple(mesh_shape.values()))
    return tuple(
        axis
        for axis, place in zip(mesh_shape, places, strict=True)
        if (place != place[:, :1]).any()
    )
