"""Machines by name: v5p:4x4x4, h100:64 (called by the plan's other files and commands/plan.py)."""

import math
import re
from dataclasses import dataclass

from gpt_jax.devices import CHIPS, Chip, peak_flops
from gpt_jax.errors import UsageError

EXAMPLES = {"tpu": "v5p:4x4x4", "gpu": "h100:8"}
# The largest pods, from Google Cloud's pages of each generation.
PODS = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 20, 28), "v6e": (16, 16), "TPU7x": (16, 24, 24)}
MOST_GPUS = 65_536  # a mistake rather than a cluster, beyond
FLAT = (1, 2, 4, 8, 16)  # sizes of a dim of a 2-D torus; of a 3-D one: 1, 2 and the multiples of 4


@dataclass(frozen=True)
class Topology:
    """`slices` times a torus of chips (`shape`), or GPUs in hosts (shape: hosts, GPUs a host; one slice)."""

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
        """Which dims of the torus close: multiples of 4 on 3-D generations (optical switches), 16 on 2-D ones (a
        pod)."""
        return tuple(size % 4 == 0 if self.chip.dims == 3 else size == 16 for size in self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.chip.dims else str(self.devices)
        return f"{self.name}:{shape}" + (f" x {self.slices} slices" if self.slices > 1 else "")


def known() -> str:
    """The names, for messages."""
    return ", ".join(f"{name}:{'x'.join('N' * max(1, chip.dims))}" for name, chip in CHIPS.items())


def offered(size: int, dims: int) -> bool:
    """Whether there are slices with a dim of this size."""
    return size in FLAT if dims == 2 else size in (1, 2) or size % 4 == 0


def check_slice(text: str, name: str, sizes: tuple[int, ...], flag: str) -> None:
    """UsageError, with one that there is, for a slice that nobody offers."""
    dims, most = CHIPS[name].dims, math.prod(PODS[name])
    shape = lambda sizes: f"as in {name}:{'x'.join(map(str, sizes))}"
    if math.prod(sizes) > most:
        raise UsageError(f"{flag}={text}: {math.prod(sizes):,} chips are more than a pod of {most:,}; {shape(PODS[name])}, "
                         "and --slices for several")
    if not all(offered(size, dims) for size in sizes):
        near = [next(n for n in range(size, 0, -1) if offered(n, dims)) for size in sizes]
        known = "1, 2, 4, 8 or 16" if dims == 2 else "1, 2 or a multiple of 4"
        raise UsageError(f"{flag}={text}: there are no such slices: each dim is {known}; {shape(near)}")


def parse(text: str, slices: int = 1, flag: str = "--topology") -> Topology:
    """ "v5p:4x4x4" or "h100:64". UsageError, with the known names, for anything else."""
    name, _, shape = text.partition(":")
    table = {key.lower(): key for key in CHIPS}
    if name.lower() not in table:
        raise UsageError(f"{flag}={text}: unknown hardware {name!r}; known are {known()}")
    name = table[name.lower()]
    chip = CHIPS[name]
    sizes = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", shape) else ()
    wanted = max(1, chip.dims)
    if len(sizes) != wanted:
        raise UsageError(f"{flag}={text}: expected {name}:{'x'.join('N' * wanted)}, as in "
                         f"{EXAMPLES[chip.platform]}")
    if slices < 1:
        raise UsageError(f"--slices={slices}: expected 1 or more")
    if chip.platform == "tpu":
        check_slice(text, name, sizes, flag)
        return Topology(name, chip, sizes, slices)
    if slices > 1:
        raise UsageError(f"--slices={slices}: GPUs have none; give their number, as in {name}:{8 * slices}")
    count = sizes[0]
    if count > MOST_GPUS:
        raise UsageError(f"{flag}={text}: more than {MOST_GPUS:,} GPUs; as in {name}:{MOST_GPUS}")
    if count > chip.per_host and count % chip.per_host:
        raise UsageError(f"{flag}={text}: {count} GPUs do not fill hosts of {chip.per_host}")
    per_host = min(count, chip.per_host)
    return Topology(name, chip, (count // per_host, per_host))
