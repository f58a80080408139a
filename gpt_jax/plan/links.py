"""Speeds of the links that a mesh axis is laid over.

An axis is laid over the machine as `sharding.make_mesh` does: the last axes lie on neighbouring
chips.
"""

import math
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.topology import Topology


class Link(NamedTuple):
    """What binds the transfers along one mesh axis."""

    name: str
    speed: float  # Bytes a second that one device sends, in one direction of all it can use.


def find_link(topology: Topology, shape: dict[str, int], across: dict[str, int], axis: str) -> Link:
    """Returns the link that mesh axis `axis` is bound by.

    `across` has the part of each axis that crosses slices (TPU) or hosts (GPU).
    """
    chip = topology.chip
    within = {name: size // across[name] for name, size in shape.items()}
    if chip.platform == "tpu":
        inside = _find_torus_link(topology, within, axis)
        if across[axis] == 1:
            return inside
        # All devices of the axis in a slice send to the other slices at once.
        speed = chip.network * within[axis]
        return Link("DCN", min(inside.speed, speed) if within[axis] > 1 else speed)

    later = configs.AXES[configs.AXES.index(axis) + 1 :]
    stride = math.prod(within[name] for name in later)
    together = max(1, min(within[axis], chip.per_host // stride))  # Devices of the axis in a host.
    if together == shape[axis] or topology.hosts == 1:
        return Link("NVLink", chip.link)
    return Link("network", min(chip.link, chip.network * together))


def _find_torus_link(topology: Topology, within: dict[str, int], axis: str) -> Link:
    """Returns the ICI link of an axis.

    The dims of the torus are given to the axes from the last one to the first. A closed dim sends
    both ways, an open one at half of that, and an axis on a part of a dim is open.

    The two cores of a chip (TPU7x) are a dim of their own, and share the links of the chip. An axis
    on the cores alone is as fast as all six links. With chips it has one more open dim.
    """
    chip = topology.chip
    free = list(zip(topology.shape, topology.wraps, strict=True))
    if chip.per_chip > 1:
        free.append((chip.per_chip, True))

    for name in reversed(configs.AXES):
        has_cores = chip.per_chip > 1 and len(free) > chip.dims
        speed = _take_dims(free, within[name], chip.link)
        if name != axis:
            continue
        if has_cores and within[name] == chip.per_chip:
            return Link("ICI", 2 * chip.dims * chip.link)
        return Link("ICI", (speed or chip.link) / chip.per_chip)
    raise KeyError(axis)


def _take_dims(free: list[tuple[int, bool]], size: int, link: float) -> float:
    """Takes dims for an axis of `size` from the end of `free`; returns the speed of their links.

    `free` has (length, whether it closes) of the dims that no axis has yet.
    """
    speed = 0.0
    while size > 1 and free:
        length, wraps = free.pop()
        part = math.gcd(size, length)
        if part == 1:
            free.append((length, wraps))
            break

        is_closed = wraps and part == length and length > 2
        speed += link * (2 if is_closed else 1)
        size //= part
        if part < length:
            free.append((length // part, False))
    return speed
