"""HLO text as instructions: computations, sizes of types, operands, called computations, trips."""

import math
import re
from typing import NamedTuple

# Bytes of one entry, by XLA's names of types (xla_data.proto). Entries below a byte are packed.
BYTES = {
    "token": 0,
    "opaque": 0,
    "f4e2m1fn": 0.5,
    "pred": 1,
    "f8e3m4": 1,
    "f8e4m3": 1,
    "f8e4m3fn": 1,
    "f8e4m3fnuz": 1,
    "f8e4m3b11fnuz": 1,
    "f8e5m2": 1,
    "f8e5m2fnuz": 1,
    "f8e8m0fnu": 1,
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
for _bits in (1, 2, 4, 8, 16, 32, 64):
    BYTES[f"s{_bits}"] = _bits / 8
    BYTES[f"u{_bits}"] = _bits / 8

_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ROLES = "calls|to_apply|body|condition|branch_computations|called_computations"
_CALLED = re.compile(rf"\b({_ROLES})=(\{{[^}}]*\}}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"(\d+)\)")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # The text of its type.
    rest: str  # The text of its operands and attributes.


Computations = dict[str, list[Instruction]]


def parse_text(text: str) -> tuple[Computations, str]:
    """Returns (instructions by computation, name of the entry)."""
    computations: Computations = {}
    entry = ""
    lines = None  # Instructions of the computation that the loop is in.

    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            instruction = _parse_instruction(line)
            if instruction and lines is not None:
                lines.append(instruction)
            continue

        head = _HEAD.match(line)
        if head:
            lines = computations.setdefault(head[1], [])
            if line.startswith("ENTRY"):
                entry = head[1]
    return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
    """Returns None for a line that continues the one before it."""
    name = _NAME.match(line)
    if not name:
        return None
    rest = line[name.end() - 1 :]
    opcode = _OPCODE.search(rest)
    if not opcode:
        return None
    return Instruction(name[1], opcode[1], rest[: opcode.start()], rest[opcode.end() :])


def size_arrays(shape: str) -> list[float]:
    """Returns the bytes of each array in the text of a type.

    Raises ValueError if the size of an entry is not in BYTES.
    """
    sizes = []
    for kind, dims in _SHAPE.findall(shape):
        if kind not in BYTES:
            raise ValueError(
                f"a compiled program has the type {kind!r}, "
                "whose size is not in gpt_jax/plan/program/text.py BYTES"
            )
        sizes.append(BYTES[kind] * math.prod(_split_numbers(dims)))
    return sizes


def size_type(shape: str) -> int:
    """Returns the bytes of all arrays in the text of a type, together."""
    return int(sum(size_arrays(shape)))


def read_dims(shape: str) -> list[int]:
    """Returns the dims of the first array in the text of a type."""
    return _split_numbers(_SHAPE.findall(shape)[0][1])


def _split_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def list_operands(instruction: Instruction) -> list[str]:
    """Returns the names of the instructions whose results it takes."""
    return _OPERAND.findall(instruction.rest.split(")")[0])


def list_called(instruction: Instruction) -> dict[str, list[str]]:
    """Returns the names of computations by the role in which the instruction calls them."""
    called = {}
    for role, text in _CALLED.findall(instruction.rest):
        names = [name.strip().lstrip("%") for name in text.strip("{}").split(",")]
        called[role] = [name for name in names if name]
    return called


def count_trips(instruction: Instruction, computations: Computations) -> int | None:
    """Returns how often the body of a `while` runs, or None where the data decides.

    It is the trip count that the compiler wrote down, or else the largest constant in the loop's
    condition.
    """
    known = _TRIPS.search(instruction.rest)
    if known:
        return int(known[1])

    condition = list_called(instruction).get("condition", [""])[0]
    limits = []
    for line in computations.get(condition, ()):
        number = _CONSTANT.match(line.rest)
        if line.opcode == "constant" and number:
            limits.append(int(number[1]))
    return max(limits, default=None)
