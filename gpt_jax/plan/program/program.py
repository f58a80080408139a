"""What a compiled program does in one run: collectives, cycles, kernels and FLOPs.

`cost_analysis` of JAX counts the body of a loop once. Here every instruction counts as often as its
computation runs.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt_jax.plan.program.collectives import COLLECTIVES, Collective, read_collective
from gpt_jax.plan.program.matmuls import count_grouped_flops, count_matmul_flops
from gpt_jax.plan.program.text import (
    Computations,
    Instruction,
    count_trips,
    list_called,
    parse_text,
    size_type,
)
from gpt_jax.plan.program.work import KINDS, find_work

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
# The SparseCore of a TPU runs what it is given beside the matmuls.
_OTHER_THREAD = re.compile(r'async_execution_thread="(?!main")')
# Opcodes whose `to_apply` runs once. Any other is what a reduction does to each pair of entries.
_CALLS = ("call", "call-start", "async-start")


@dataclass(frozen=True)
class Program:
    """Sums over one run of the program."""

    collectives: tuple[Collective, ...]
    cycles: int  # The compiler's own estimates.
    work: dict[str, int]  # The same cycles by the kinds of work.KINDS.
    kernels: dict[str, int]  # Custom calls by target.
    matmul_flops: float  # All that is not in the two below.
    turn_flops: float  # One turn of the loops whose length the data decides.
    # Experts' grouped matmuls on TPUs, every row of their buffers counted. Their kernels carry no
    # cycles.
    grouped_flops: float


class _Place(NamedTuple):
    """How a computation is reached."""

    times: int  # How often it runs.
    counted: bool  # Its cycles are not added: its caller carries them, or another core runs it.
    background: bool  # A collective that starts in it runs in the background.
    turn: bool  # It is a turn of a loop whose length the data decides.
    fused: bool  # It is inside a fusion, where libtpu repeats a collective that is on its way.


@dataclass
class _Tally:
    """Sums while a program is read."""

    work: Counter = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    kernels: Counter = field(default_factory=Counter)
    matmul_flops: float = 0.0
    turn_flops: float = 0.0
    grouped_flops: float = 0.0
    # (channel, transfer) -> how often its instructions run. Channels alone are not unique.
    transfers: Counter = field(default_factory=Counter)
    # (channel, transfer) -> how often it is started and left to run.
    hidden: Counter = field(default_factory=Counter)
    # (channel, transfer) -> how often it runs where no fusion is around it and nothing starts it.
    plain: Counter = field(default_factory=Counter)


class _Scope(NamedTuple):
    """A computation whose lines are counted."""

    name: str
    shapes: dict[str, str]  # Texts of types by instruction.
    sizes: dict[str, int]  # Bytes of results by instruction.
    starts: bool  # Its collectives start here and run on in the background.


def read_program(text: str, mesh_shape: dict[str, int]) -> Program:
    """Returns the program of `text` on a mesh of these axes, in their order.

    Raises ValueError if the text has a type of unknown size.
    """
    computations, entry = parse_text(text)
    tally = _Tally()

    def visit(name: str, place: _Place) -> None:
        lines = computations.get(name, [])
        scope = _make_scope(name, lines)
        for line in lines:
            _count_cycles(tally, line, place, computations)
            _count_work(tally, line, scope, place)
            _count_transfer(tally, line, scope, place, mesh_shape)
            for inner, inner_place in _list_inner(line, place, computations):
                visit(inner, inner_place)

    visit(entry, _Place(times=1, counted=False, background=False, turn=False, fused=False))
    return Program(
        collectives=_list_collectives(tally),
        cycles=sum(tally.work.values()),
        work=dict(tally.work),
        kernels=dict(tally.kernels),
        matmul_flops=tally.matmul_flops,
        turn_flops=tally.turn_flops,
        grouped_flops=tally.grouped_flops,
    )


def _make_scope(name: str, lines: list[Instruction]) -> _Scope:
    targets = [_TARGET.search(line.rest) for line in lines]
    return _Scope(
        name,
        shapes={line.name: line.result for line in lines},
        sizes={line.name: size_type(line.result) for line in lines},
        starts=any(target and target[1] == "AsyncCollectiveStart" for target in targets),
    )


def _count_cycles(
    tally: _Tally, line: Instruction, place: _Place, computations: Computations
) -> None:
    """Adds the cycles of a line to those of its kind of work."""
    cycles = _CYCLES.search(line.rest)
    if cycles and not place.counted:
        tally.work[find_work(line, computations)] += place.times * int(cycles[1])


def _count_work(tally: _Tally, line: Instruction, scope: _Scope, place: _Place) -> None:
    """Adds the FLOPs and kernels of a line."""
    flops = place.times * count_matmul_flops(line, scope.shapes)
    if place.turn:
        tally.turn_flops += flops
    else:
        tally.matmul_flops += flops
    tally.grouped_flops += place.times * count_grouped_flops(line, scope.shapes)

    target = _TARGET.search(line.rest)
    if line.opcode == "custom-call" and target:
        tally.kernels[target[1]] += place.times


def _count_transfer(
    tally: _Tally, line: Instruction, scope: _Scope, place: _Place, mesh_shape: dict[str, int]
) -> None:
    """Adds a line that is a collective."""
    kind = line.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    # libtpu writes a reduce-scatter as a fusion of a sum and a slice, and names it so.
    if scope.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"

    number = _CHANNEL.search(line.rest)
    channel = number[1] if number else f"{scope.name}/{line.name}"
    key = channel, read_collective(line, kind, mesh_shape, scope.sizes)

    tally.transfers[key] += place.times
    if place.background or scope.starts or line.opcode.endswith("-start"):
        tally.hidden[key] += place.times
    elif not place.fused:
        tally.plain[key] += place.times


def _list_inner(
    line: Instruction, place: _Place, computations: Computations
) -> list[tuple[str, _Place]]:
    """Returns the computations that the line calls, and how each is reached."""
    # The end of an asynchronous computation names the one that its start has run.
    if line.opcode.endswith(("-done", "-update")):
        return []

    is_counted = bool(_CYCLES.search(line.rest) or _OTHER_THREAD.search(line.rest))
    inner = []
    for role, names in list_called(line).items():
        if role == "to_apply" and line.opcode not in _CALLS:
            continue
        is_loop = line.opcode == "while" and role in ("body", "condition")
        trips = count_trips(line, computations) if is_loop else 1
        inner_place = _Place(
            times=place.times * (trips or 1),
            counted=place.counted or is_counted,
            background=place.background or line.opcode.endswith("-start"),
            turn=place.turn or not trips,
            fused=place.fused or line.opcode == "fusion",
        )
        inner += [(name, inner_place) for name in names]
    return inner


def _list_collectives(tally: _Tally) -> tuple[Collective, ...]:
    """Returns the collectives, those that send the most first.

    libtpu writes an asynchronous collective several times: where it starts, in the fusions that it
    runs behind, and at its end. It counts as often as it starts. Other collectives count wherever
    they stand, because equal ones may share a channel.
    """
    calls: Counter = Counter()
    for key, runs in tally.transfers.items():
        transfer = key[1]
        starts = tally.hidden[key]
        calls[transfer, True] += starts
        calls[transfer, False] += tally.plain[key] if starts else runs

    collectives = [
        Collective(transfer.kind, transfer.axes, transfer.bytes, count, is_hidden)
        for (transfer, is_hidden), count in calls.items()
        if transfer.axes and count
    ]
    collectives.sort(key=lambda collective: -collective.bytes * collective.calls)
    return tuple(collectives)
