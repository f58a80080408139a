"""Machines by name, as in v5p:4x4x4 or h100:64."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gpt_jax.errors import UsageError
from gpt_jax.hardware import CHIPS, Chip, peak_flops, peak_fp8_flops

EXAMPLES = {0: "8", 2: "4x4", 3: "4x4x4"}  # Shapes by dims of the torus.
# The largest pods, from Google Cloud's pages of each generation.
PODS = {
    "v4": (16, 16, 16),
    "v5e": (16, 16),
    "v5p": (16, 20, 28),
    "v6e": (16, 16),
    "TPU7x": (16, 24, 24),
}
# A larger number is a mistake rather than a cluster.
MOST_GPUS = 65_536
MOST_SLICES = 1024
# Slices that Google Cloud's pages of v4, v5e, v5p, v6e and TPU7x offer. FLAT has all of the 2-D
# generations. SMALL has those of the 3-D ones below a cube of 4x4x4; in larger ones every dim is a
# multiple of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SHAPE = re.compile(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*")


@dataclass(frozen=True)
class Topology:
    """`slices` times a torus of chips, or GPUs in hosts."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # TPUs: chips along each dim; GPUs: hosts, and cards of a host.
    slices: int = 1  # GPUs have one.

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.per_chip * self.slices

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.chip.per_host)

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of one device."""
        peak = peak_flops(self.chip.kind)
        assert peak, f"{self.chip.kind} has no row in gpt_jax/hardware/chips.py PEAKS"
        return peak

    @property
    def fp8_peak(self) -> float | None:
        """Dense fp8 FLOP/s of one device; None where XLA emulates fp8."""
        return peak_fp8_flops(self.chip.kind)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dims of the torus close.

        On 3-D generations optical switches close multiples of 4. On 2-D ones only a whole pod's 16
        closes.
        """
        if self.chip.dims == 3:
            return tuple(size % 4 == 0 for size in self.shape)
        return tuple(size == 16 for size in self.shape)

    def __str__(self) -> str:
        shape = join_sizes(self.shape) if self.chip.dims else str(self.devices)
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.name}:{shape}{slices}"


def join_sizes(sizes: Iterable[int]) -> str:
    """Joins (4, 4, 8) to "4x4x8"."""
    return "x".join(map(str, sizes))


def _split_sizes(text: str) -> tuple[int, ...]:
    """Splits "4x4x8" into (4, 4, 8); anything that is no shape gives ()."""
    return tuple(map(int, text.split("x"))) if _SHAPE.fullmatch(text) else ()


def _format_pattern(name: str) -> str:
    """Returns the form of a machine's name, as in "v5p:NxNxN"."""
    return f"{name}:{'x'.join('N' * _count_sizes(CHIPS[name]))}"


def _count_sizes(chip: Chip) -> int:
    return max(1, chip.dims)


def list_slices(name: str) -> list[tuple[int, ...]]:
    """Returns the shapes of slices that a generation of TPUs offers."""
    if CHIPS[name].dims == 2:
        return [*FLAT]
    multiples = (range(4, most + 1, 4) for most in PODS[name])
    return [*SMALL, *itertools.product(*multiples)]


def parse_topology(text: str, slices: int = 1, flag: str = "--topology") -> Topology:
    """Returns the machine of a text such as "v5p:4x4x4" or "h100:64".

    Raises UsageError if the text names no machine that one can rent. The message has one that is
    near, or the known names.
    """
    name, _, shape = text.partition(":")
    names = {key.lower(): key for key in CHIPS}
    if name.lower() not in names:
        known = ", ".join(map(_format_pattern, CHIPS))
        raise UsageError(f"{flag}={text}: unknown hardware {name!r}; known are {known}")

    name = names[name.lower()]
    chip = CHIPS[name]
    sizes = _split_sizes(shape)
    if len(sizes) != _count_sizes(chip):
        raise UsageError(
            f"{flag}={text}: expected {_format_pattern(name)}, as in {name}:{EXAMPLES[chip.dims]}"
        )
    if not 1 <= slices <= MOST_SLICES:
        raise UsageError(f"--slices={slices}: expected 1 to {MOST_SLICES}")

    if chip.platform == "tpu":
        check_slice(text, name, sizes, flag)
        return Topology(name, chip, sizes, slices)
    count = sizes[0]
    check_cards(text, name, count, slices, flag)
    per_host = min(count, chip.per_host)
    return Topology(name, chip, (count // per_host, per_host))


def check_slice(text: str, name: str, sizes: tuple[int, ...], flag: str) -> None:
    """Raises UsageError if nobody offers such a slice; the message names one that is offered."""
    count = math.prod(sizes)
    most = PODS[name]
    if count > math.prod(most):
        raise UsageError(
            f"{flag}={text}: {count:,} chips are more than a pod of {math.prod(most):,}; "
            f"as in {name}:{join_sizes(most)}, and --slices for several"
        )

    shapes = list_slices(name)
    if sizes in shapes:
        return
    if CHIPS[name].dims == 2:
        offered = ", ".join(map(join_sizes, FLAT))
    else:
        offered = f"{', '.join(map(join_sizes, SMALL))} and multiples of 4 up to {join_sizes(most)}"
    raise UsageError(
        f"{flag}={text}: there are no such slices; offered are {offered}; "
        f"as in {name}:{join_sizes(_find_near_slice(shapes, count))}"
    )


def _find_near_slice(shapes: list[tuple[int, ...]], count: int) -> tuple[int, ...]:
    """Returns the largest slice of at most `count` chips, and of those the nearest to a cube."""

    def rank(shape):
        return math.prod(shape), -sum(shape), shape[::-1]

    smaller = [shape for shape in shapes if math.prod(shape) <= count]
    return max(smaller, key=rank, default=shapes[0])


def check_cards(text: str, name: str, count: int, slices: int, flag: str) -> None:
    """Raises UsageError if so many GPUs are no cluster, or do not fill their hosts."""
    if slices > 1:
        raise UsageError(
            f"--slices={slices}: GPUs have none; "
            f"give the number of all of them, as in {name}:{count * slices}"
        )
    if count > MOST_GPUS:
        raise UsageError(f"{flag}={text}: more than {MOST_GPUS:,} GPUs; as in {name}:{MOST_GPUS}")

    per_host = CHIPS[name].per_host
    if count > per_host and count % per_host:
        fewer = count - count % per_host
        raise UsageError(
            f"{flag}={text}: {count} GPUs do not fill hosts of {per_host}; "
            f"take {name}:{fewer} or {name}:{fewer + per_host}"
        )
