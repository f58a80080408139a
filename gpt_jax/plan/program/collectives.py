"""Collectives of a program: which kind, over which axes of the mesh, and how many bytes."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from gpt_jax.plan.program.groups import find_axes, read_groups
from gpt_jax.plan.program.text import Instruction, list_operands, size_arrays

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind, with one size, over one set of mesh axes."""

    kind: str
    axes: tuple[str, ...]
    bytes: int  # What one device sends in one call.
    calls: int
    asynchronous: bool


class Transfer(NamedTuple):
    """One instruction's collective; its fields are those of Collective."""

    kind: str
    axes: tuple[str, ...]
    bytes: int


def count_sent_bytes(kind: str, result: float, operands: float, members: int) -> int:
    """Returns the bytes that one device sends in a collective over `members` devices.

    They are those of the algorithms that move the least.
    """
    share = (members - 1) / members if members else 0
    sent = {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": operands * share,
        "all-to-all": result * share,
        "ragged-all-to-all": result * share,
    }
    return round(sent.get(kind, result))


def read_collective(
    line: Instruction, kind: str, mesh_shape: dict[str, int], sizes: dict[str, int]
) -> Transfer:
    """Returns what `line` moves. `sizes` are the bytes of the results by instruction."""
    operands = sum(sizes.get(name, 0) for name in list_operands(line))
    arrays = [int(size) for size in size_arrays(line.result)]
    result = sum(arrays)

    # The result of a `-start` is (operands, results, …), except for a sum.
    if line.opcode.endswith("-start") and kind == "all-gather":
        result = max(operands, result - operands)
    elif line.opcode.endswith("-start") and kind != "all-reduce":
        result = max(arrays, default=0)

    members = read_groups(line.rest)
    count = math.prod(mesh_shape.values()) if members is None else members.shape[1]
    if kind == "reduce-scatter" and not operands:
        operands = result * count
    sent = count_sent_bytes(kind, result, operands, count)
    return Transfer(kind, find_axes(members, mesh_shape), sent)
