"""What a compiled program does, read from its HLO text: collectives with their bytes and the
compiler's own cycles, loops multiplied in (called by compiled.py).

`cost_analysis` counts the body of a loop once; here every instruction counts as often as its
computation runs: bodies of `while` by the trip count that the compiler wrote down, or by the
constant that the loop's condition compares with.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Of an entry, by XLA's names of types (xla_data.proto); those below a byte are packed.
BYTES = (
    {f"{kind}{bits}": bits / 8 for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}
    | dict.fromkeys(
        (
            "pred",
            "f8e3m4",
            "f8e4m3",
            "f8e4m3fn",
            "f8e4m3fnuz",
            "f8e4m3b11fnuz",
            "f8e5m2",
            "f8e5m2fnuz",
            "f8e8m0fnu",
        ),
        1,
    )
    | {
        "token": 0,
        "opaque": 0,
        "f4e2m1fn": 0.5,
        "f16": 2,
        "bf16": 2,
        "f32": 4,
        "f64": 8,
        "c64": 8,
        "c128": 16,
    }
)
COST_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_ROLES = "calls|to_apply|body|condition|branch_computations|called_computations"
_CALLED = re.compile(rf"\b({_ROLES})=(\{{[^}}]*\}}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_GROUPED = re.compile(
    r"(ragged-dot-none|tgmm)\b"
)  # libtpu's and megablox's kernels, by their names
_CUBLAS = re.compile(r'custom_call_target="__cublas')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


class Instruction(NamedTuple):
    """One line. `result`: the text of its type, `rest`: operands and attributes."""

    name: str
    opcode: str
    result: str
    rest: str


@dataclass(frozen=True)
class Collective:
    """Calls of one kind, with one size, over one set of mesh axes. `bytes`: what one device
    sends in one call."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    calls: int
    asynchronous: bool


@dataclass(frozen=True)
class Program:
    """Sums over one run of the program. `cycles`: the compiler's estimates; `kernels`: custom
    calls by target. `turn_flops`: of one turn of the loops whose length the data decides,
    `matmul_flops` of all else. `grouped_flops`: of experts' grouped matmuls on TPUs, whose
    kernels carry no cycles, every row of their buffers counted; in `matmul_flops` they are not."""

    collectives: tuple[Collective, ...]
    cycles: int
    kernels: dict[str, int]
    matmul_flops: float
    turn_flops: float
    grouped_flops: float


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions by computation, name of the entry)."""
    found, entry, now = {}, "", None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            name = _NAME.match(line)
            if name and now is not None:
                rest = line[name.end() - 1 :]
                opcode = _OPCODE.search(rest)
                if opcode:
                    now.append(
                        Instruction(
                            name[1], opcode[1], rest[: opcode.start()], rest[opcode.end() :]
                        )
                    )
        elif head := _HEAD.match(line):
            now = found.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
    return found, entry


def size_of(shape: str) -> int:
    """Bytes of all arrays in the text of a type. ValueError for a type whose size is not known."""
    arrays = _SHAPE.findall(shape)
    if unknown := [kind for kind, _ in arrays if kind not in BYTES]:
        raise ValueError(
            f"a compiled program has the type {unknown[0]!r}, whose size is not in gpt_jax/plan/hlo.py BYTES"
        )
    return int(
        sum(
            BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
            for kind, dims in arrays
        )
    )


def called(instruction: Instruction) -> dict[str, list[str]]:
    """Computations by the role in which the instruction calls them."""
    return {
        role: [name.strip().lstrip("%") for name in names.strip("{}").split(",") if name.strip()]
        for role, names in _CALLED.findall(instruction.rest)
    }


def trips(instruction: Instruction, computations: dict) -> int | None:
    """How often the body of a while runs; None where the data decides."""
    if known := _TRIPS.search(instruction.rest):
        return int(known[1])
    condition = called(instruction).get("condition", [""])[0]
    limits = [
        int(number[1])
        for line in computations.get(condition, ())
        if line.opcode == "constant" and (number := re.match(r"(\d+)\)", line.rest))
    ]
    return max(limits, default=None)


def groups(rest: str) -> np.ndarray | None:
    """The devices that talk to each other, one row a group; of a permute, its (source, target)
    pairs."""
    if iota := _IOTA.search(rest):
        shape, dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if named := _AXES.search(rest):
        return _named_groups(*named.groups())
    listed = _GROUPS.search(rest) or _PAIRS.search(rest)
    if not listed:
        return None
    return np.array(
        [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", listed[1])]
    )


def _named_groups(mesh: str, numbers: str | None, chosen: str) -> np.ndarray:
    """Groups over axes of a mesh of XLA's own: `'a'=8,'b'=4` and `'a','b'`, or `'a':(2)4` for a
    part of an axis: the middle one of its (2, 4, 1) parts. `numbers`: the devices of the mesh,
    as `[4,8]T(1,0)` or a list; else in order."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    listed = re.findall(r"'([^']+)':\((\d+)\)(\d+)", chosen)
    parts = {
        name: [(int(before), int(size)) for of, before, size in listed if of == name]
        for name in sizes
    }
    whole = set(re.findall(r"'([^']+)'(?!:)", chosen))
    shape, inside = [], []
    for name, size in sizes.items():
        cuts = sorted(
            {1, size, *(cut for before, n in parts[name] for cut in (before, before * n))}
        )
        for low, high in itertools.pairwise(cuts):
            shape.append(high // low)
            inside.append(
                name in whole
                or any(before <= low and high <= before * n for before, n in parts[name])
            )
    ids = np.arange(math.prod(shape))
    if numbers and (order := _ORDER.search(numbers)):
        dims = [int(n) for n in order[1].split(",")]
        ids = (
            ids.reshape(dims)
            .transpose([int(n) for n in order[2].split(",")] if order[2] else None)
            .ravel()
        )
    elif numbers:
        ids = np.array([int(n) for n in numbers.split(",")])
    ids = ids.reshape(shape)
    order = [i for i, yes in enumerate(inside) if not yes] + [
        i for i, yes in enumerate(inside) if yes
    ]
    return ids.transpose(order).reshape(-1, math.prod(n for n, yes in zip(shape, inside) if yes))


def axes_of(members: np.ndarray | None, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of the groups differ (devices numbered in the order
    of the mesh)."""
    if members is None:
        return tuple(axis for axis, size in mesh_shape.items() if size > 1)
    places = np.stack(np.unravel_index(members, tuple(mesh_shape.values())))
    return tuple(axis for axis, place in zip(mesh_shape, places) if (place != place[:, :1]).any())


def sent(kind: str, result: int, operands: int, members: int) -> int:
    """Bytes that one device sends in a collective over `members` devices, by the algorithms that
    move the least."""
    share = (members - 1) / members if members else 0
    return round(
        {
            "all-gather": result * share,
            "all-reduce": 2 * result * share,
            "reduce-scatter": operands * share,
            "all-to-all": result * share,
            "ragged-all-to-all": result * share,
        }.get(kind, result)
    )


def _collective(line: Instruction, kind: str, mesh_shape: dict, sizes: dict[str, int]) -> tuple:
    """(kind, axes, bytes). The result of a `-start` holds its operands too."""
    started = line.opcode.endswith("-start")
    operands = sum(
        sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", line.rest.split(")")[0])
    )
    arrays = [size_of(f"{name}[{dims}]") for name, dims in _SHAPE.findall(line.result)]
    result = sum(arrays)
    if started and kind != "all-reduce":  # (operands, results, …)
        result = (
            max(operands, result - operands) if kind == "all-gather" else max(arrays, default=0)
        )
    members = groups(line.rest)
    count = math.prod(mesh_shape.values()) if members is None else members.shape[1]
    if kind == "reduce-scatter" and not operands:
        operands = result * count
    return kind, axes_of(members, mesh_shape), sent(kind, result, operands, count)


def _flops(line: Instruction, shapes: dict[str, str]) -> float:
    """Of a dot, a call of cuBLAS or (TPU) a convolution that is one: 2 x result x contracted.
    Dims of the operands are read off their lines."""
    if line.opcode not in ("dot", "convolution") and not (
        line.opcode == "custom-call" and _CUBLAS.search(line.rest)
    ):
        return 0.0
    names = re.findall(r"%([\w.\-]+)", line.rest.split(")")[0])

    def dims(text):
        return [int(n) for n in _SHAPE.findall(text)[0][1].split(",") if n]

    if len(names) < 2 or not all(name in shapes for name in names):
        return 0.0
    result, left, right = dims(line.result), dims(shapes[names[0]]), dims(shapes[names[1]])
    if line.opcode != "convolution":
        if not (contracted := _CONTRACTED.search(line.rest)):  # cuBLAS solves triangles too
            return 0.0
        return (
            2.0
            * math.prod(result)
            * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))
        )
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    if not labels:
        return 0.0
    window = dict(
        re.findall(
            r"\b(size|stride|pad|lhs_dilate)=([\dx_]+)",
            re.search(r"window=\{([^}]*)\}|$", line.rest)[0],
        )
    )

    def of(name, i, missing):
        return window[name].split("x")[i] if name in window else missing

    taps = 1.0
    for i, digit in enumerate(sorted(filter(str.isdigit, labels[1]))):
        low = int(of("pad", i, "0_0").split("_")[0])
        taps *= _taps(
            left[labels[1].index(digit)],
            result[labels[3].index(digit)],
            int(of("size", i, 1)),
            int(of("stride", i, 1)),
            low,
            int(of("lhs_dilate", i, 1)),
        )
    return 2.0 * math.prod(result) * right[labels[2].index("i")] * taps


def _taps(entries: int, results: int, size: int, stride: int, low: int, dilation: int) -> float:
    """Of `size` taps of a window, how many meet an entry, on average over the results: libtpu
    writes batch dims as spatial ones, dilated or padded so that one tap does."""
    place = np.arange(results)[:, None] * stride + np.arange(size) - low
    return (
        (place >= 0) & (place <= (entries - 1) * dilation) & (place % dilation == 0)
    ).sum() / results


def _grouped_flops(line: Instruction, shapes: dict[str, str]) -> float:
    """Of a grouped matmul: rows [m, k] with kernels [groups, k, n] -> [m, n], or rows [m, k]
    with rows [m, n] -> [groups, k, n]. The first rows are the last operand but one."""
    if line.opcode != "custom-call" or not _GROUPED.match(line.name):
        return 0.0
    rows = shapes[re.findall(r"%([\w.\-]+)", line.rest.split(")")[0])[-2]]

    def dims(text):
        return [int(n) for n in _SHAPE.findall(text)[0][1].split(",")]

    return 2.0 * math.prod(dims(rows)) * dims(line.result)[-1]


def read(text: str, mesh_shape: dict[str, int]) -> Program:
    """The program of `text` on a mesh of these axes (in order)."""
    computations, entry = parse(text)
    found: dict[
        tuple, Counter
    ] = {}  # channel, kind, axes, bytes -> how often each of its instructions runs
    hidden: Counter = Counter()  # channel -> how often it is started and left to run
    kernels: Counter = Counter()
    flops = [0.0, 0.0]  # of everything, but of one turn of loops whose length the data decides
    sums = Counter()

    def visit(name: str, times: int, counted: bool, background: bool, turn: bool):
        """`counted`: an instruction around this computation carries its cycles; `background`:
        one started here is; `turn`: it is a turn of a loop whose length the data decides."""
        lines = computations.get(name, ())
        sizes, shapes = (
            {line.name: size_of(line.result) for line in lines},
            {line.name: line.result for line in lines},
        )
        targets = [target[1] for line in lines if (target := _TARGET.search(line.rest))]
        for line in lines:
            own = None if counted else _CYCLES.search(line.rest)
            sums["cycles"] += times * int(own[1]) if own else 0
            flops[turn] += times * _flops(line, shapes)
            sums["grouped"] += times * _grouped_flops(line, shapes)
            kind = line.opcode.removesuffix("-start")
            if kind in COST_KINDS:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                row = _collective(line, kind, mesh_shape, sizes)
                number = _CHANNEL.search(line.rest)
                channel = (
                    number[1] if number else f"{name}/{line.name}",
                    *row,
                )  # numbers alone are not unique
                found.setdefault(channel, Counter())[f"{name}/{line.name}"] += times
                if (
                    background
                    or line.opcode.endswith("-start")
                    or "AsyncCollectiveStart" in targets
                ):
                    hidden[channel] += times
            if line.opcode == "custom-call" and (target := _TARGET.search(line.rest)):
                kernels[target[1]] += times
            for role, names in called(line).items():
                if role == "to_apply" and line.opcode not in ("call", "async-start"):
                    continue  # what a reduction does to each pair
                repeat = (
                    trips(line, computations)
                    if line.opcode == "while" and role in ("body", "condition")
                    else 1
                )
                for inner in names:
                    visit(
                        inner,
                        times * (repeat or 1),
                        counted or bool(own),
                        background or line.opcode == "async-start",
                        turn or not repeat,
                    )

    visit(entry, 1, False, False, False)
    # libtpu writes an asynchronous collective several times: where it starts, in the fusions that
    # it runs behind, at its end; and a reduce-scatter as a fusion, named all-reduce-scatter, of a
    # sum and a slice.
    calls: Counter = Counter()
    for channel, instructions in found.items():
        calls[*channel[1:], channel in hidden] += hidden[channel] or max(instructions.values())
    rows = [
        Collective(kind, axes, size, count, late)
        for (kind, axes, size, late), count in calls.items()
        if axes
    ]
    rows.sort(key=lambda row: -row.bytes * row.calls)
    return Program(
        tuple(rows), sums["cycles"], dict(kernels), flops[0], flops[1], float(sums["grouped"])
    )
