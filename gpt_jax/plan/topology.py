"""Machines by name: v5p:4x4x4, h100:64 (called by the plan's other files and commands/plan.py)."""

import itertools
import math
import re
from dataclasses import dataclass

from gpt_jax.errors import UsageError
from gpt_jax.hardware import CHIPS, Chip, peak_flops

EXAMPLES = {0: "8", 2: "4x4", 3: "4x4x4"}  # shapes, by dims of the torus
# The largest pods, from Google Cloud's pages of each generation.
PODS = {
    "v4": (16, 16, 16),
    "v5e": (16, 16),
    "v5p": (16, 20, 28),
    "v6e": (16, 16),
    "TPU7x": (16, 24, 24),
}
MOST_GPUS, MOST_SLICES = 65_536, 1024  # a mistake rather than a cluster, beyond
# Slices that Google Cloud's pages offer (v4, v5e, v5p, v6e, TPU7x): all of the 2-D generations;
# those of the 3-D ones below a cube of 4x4x4, beyond which every dim is a multiple of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclass(frozen=True)
class Topology:
    """`slices` times a torus of chips (`shape`), or GPUs in hosts (shape: hosts, GPUs a host;
    one slice)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.per_chip * self.slices

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.chip.per_host)

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of one device."""
        return peak_flops(self.chip.kind)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dims of the torus close: multiples of 4 on 3-D generations (optical switches),
        16 on 2-D ones (a pod)."""
        return tuple(size % 4 == 0 if self.chip.dims == 3 else size == 16 for size in self.shape)

    def __str__(self) -> str:
        shape = by(self.shape) if self.chip.dims else str(self.devices)
        return f"{self.name}:{shape}" + (f" x {self.slices} slices" if self.slices > 1 else "")


def known() -> str:
    """The names, for messages."""
    return ", ".join(f"{name}:{'x'.join('N' * max(1, chip.dims))}" for name, chip in CHIPS.items())


def offered(name: str) -> list[tuple[int, ...]]:
    """Shapes of the slices that there are."""
    if CHIPS[name].dims == 2:
        return [*FLAT]
    return [*SMALL, *itertools.product(*(range(4, most + 1, 4) for most in PODS[name]))]


def by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def check_slice(text: str, name: str, sizes: tuple[int, ...], flag: str) -> None:
    """UsageError, with one that there is, for a slice that nobody offers."""
    count, most, shapes = math.prod(sizes), PODS[name], offered(name)
    if count > math.prod(most):
        raise UsageError(
            f"{flag}={text}: {count:,} chips are more than a pod of {math.prod(most):,}; as in {name}:{by(most)}, "
            "and --slices for several"
        )
    if sizes not in shapes:
        # The largest that has no more chips, and of those the nearest to a cube.
        near = max(
            (s for s in shapes if math.prod(s) <= count),
            key=lambda s: (math.prod(s), -sum(s), s[::-1]),
            default=shapes[0],
        )
        rest = "" if len(most) == 2 else f" and multiples of 4 up to {by(most)}"
        raise UsageError(
            f"{flag}={text}: there are no such slices; offered are "
            f"{', '.join(map(by, FLAT if len(most) == 2 else SMALL))}{rest}; as in {name}:{by(near)}"
        )


def parse_topology(text: str, slices: int = 1, flag: str = "--topology") -> Topology:
    """ "v5p:4x4x4" or "h100:64". UsageError, with the known names, for anything else."""
    name, _, shape = text.partition(":")
    table = {key.lower(): key for key in CHIPS}
    if name.lower() not in table:
        raise UsageError(f"{flag}={text}: unknown hardware {name!r}; known are {known()}")
    name = table[name.lower()]
    chip = CHIPS[name]
    sizes = (
        tuple(map(int, shape.split("x")))
        if re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", shape)
        else ()
    )
    wanted = max(1, chip.dims)
    if len(sizes) != wanted:
        raise UsageError(
            f"{flag}={text}: expected {name}:{'x'.join('N' * wanted)}, as in {name}:{EXAMPLES[chip.dims]}"
        )
    if not 1 <= slices <= MOST_SLICES:
        raise UsageError(f"--slices={slices}: expected 1 to {MOST_SLICES}")
    if chip.platform == "tpu":
        check_slice(text, name, sizes, flag)
        return Topology(name, chip, sizes, slices)
    count = sizes[0]
    if slices > 1:
        raise UsageError(
            f"--slices={slices}: GPUs have none; give the number of all of them, as in {name}:{count * slices}"
        )
    if count > MOST_GPUS:
        raise UsageError(f"{flag}={text}: more than {MOST_GPUS:,} GPUs; as in {name}:{MOST_GPUS}")
    if count > chip.per_host and count % chip.per_host:
        raise UsageError(
            f"{flag}={text}: {count} GPUs do not fill hosts of {chip.per_host}; take "
            f"{name}:{count - count % chip.per_host} or {name}:{count - count % chip.per_host + chip.per_host}"
        )
    per_host = min(count, chip.per_host)
    return Topology(name, chip, (count // per_host, per_host))
