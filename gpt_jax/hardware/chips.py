"""Peak rates, memories and links of chips, and the peak that a run's MFU is relative to.

A device that the table does not know has no peak, so its MFU is not reported. A number under a
guessed peak would be worse than none. The peak of a CPU is measured, in float32.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

# Dense peaks in FLOP/s of one JAX device: bfloat16, and fp8 where the device multiplies
# float8_e4m3fn and float8_e5m2 by itself. Elsewhere XLA converts them first, which gains nothing. A
# row applies if its pattern matches the whole `device_kind`, and the first such row wins.
#
# TPU: Google Cloud's "system architecture" page of each generation gives the bf16 peak of a chip.
# The kinds are those of jax/_src/pallas/mosaic/tpu_info.py. One chip is one device on v4 and v5p
# (megacore), and two devices on TPU7x, whose chip has 2,307e12, and 4,614e12 in fp8. The pages of
# v5p and v6e print their bf16 peak for fp8 too, so these have no row for it.
#
# NVIDIA: data sheets of A100, H100, H200, GH200, HGX B200 and GB200 NVL72. From H100 on they print
# the figure with 2:4 sparsity, which is halved here: SXM 1,979e12, PCIe 1,513e12, NVL 1,671e12,
# B200 4.5e15, GB200 5e15. They print twice as much for fp8. AMD: the MI300X data sheet, peak
# bfloat16 without sparsity. Its fp8 is that of other formats (fnuz).
#
# A MIG slice carries the card's name plus " MIG …". It has no row, because it is a fraction of the
# card that we do not know.
PEAKS = (
    (r"TPU v4", 275e12, None),
    (r"TPU v5 lite|TPU v5e", 197e12, None),
    (r"TPU v5|TPU v5p", 459e12, None),
    (r"TPU v6 lite|TPU v6e", 918e12, None),
    (r"TPU7x", 2307e12 / 2, 4614e12 / 2),
    (r"NVIDIA A100(-SXM4-\d+GB|-PCI[Ee]-\d+GB| \d+GB PCIe)?", 312e12, None),
    (r"NVIDIA H100 PCIe", 756.5e12, 1513e12),
    (r"NVIDIA H[12]00 NVL", 835.5e12, 1671e12),
    (r"NVIDIA H100( \d+GB HBM[23]e?)?", 989e12, 1979e12),
    (r"NVIDIA H200( \d+GB HBM3e?)?", 989e12, 1979e12),
    (r"NVIDIA GH200 (120|144|480)GB", 989e12, 1979e12),
    (r"NVIDIA B200( \d+GB HBM3e)?", 2250e12, 4500e12),
    (r"NVIDIA GB200( \d+GB HBM3e)?", 2500e12, 5000e12),
    (r"AMD Instinct MI300X( OAM)?", 1307.4e12, None),
)


GIB = 2**30
# The part of a card's memory that commands/environment.py takes at the start. JAX by itself takes
# 0.75. The rest is for CUDA, its libraries and NCCL's buffers. An environment that sets
# XLA_CLIENT_MEM_FRACTION keeps its own value.
GPU_FRACTION = 0.9


@dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind has, in bytes and bytes a second.

    Links and networks are counted in one direction.
    """

    kind: str  # The `device_kind`, which a row of PEAKS matches.
    platform: str  # It is "tpu" or "gpu".
    shown: int  # Bytes of memory: on TPUs what a program may fill, on GPUs what the driver shows.
    bandwidth: float  # Bytes a second between that memory and the cores.
    link: float  # Bytes a second of one ICI link; on GPUs of all NVLinks of one card.
    dims: int  # Dims of the torus; 0 stands for a switch.
    network: float  # Bytes a second to other slices (TPU) or to other hosts (GPU).
    per_host: int  # Devices of one host.
    per_chip: int = 1  # Devices of one chip.
    clock: float = 0.0  # Hz of the compiler's cycles, known for TPUs alone.

    @property
    def memory(self) -> int:
        """Bytes that a program may fill."""
        return int(self.shown * GPU_FRACTION) if self.platform == "gpu" else self.shown


# Chips by the name that --topology takes.
#
# TPU memory: what libtpu 0.0.42 says a program may use when it refuses a larger one. JAX drives the
# two cores of a v4 as one device, so its memory is that of the data sheet less what v5p keeps back.
#
# TPU bandwidths: the tables of Google Cloud's pages v4, v5e, v5p, v6e and TPU7x. Memory has 1,200,
# 819, 2,765, 1,638 and 7,380 GB/s a chip. ICI has 600, 400, 1,200, 800 and 1,200 GB/s a chip in
# both directions, over 6 links (3-D torus) or 4 (2-D). The data centre network has 50, 25, 50, 100
# and 100 Gb/s a chip. A device of TPU7x has half of its chip's.
#
# TPU clocks: the peak of PEAKS over 2 x rows x columns x arrays of the matrix units. v4 and v5p
# have 8 arrays of 128 x 128, and v5e has 4 of them. v6e and TPU7x have 4 arrays of 256 x 256. An
# 8,192-cubed matmul was compiled for each; its cycles give 70 to 90 % of that peak.
#
# GPUs: the data sheets. H100 SXM has 80 GB, 3.35 TB/s, and NVLink of 900 GB/s in both directions.
# H200 SXM has 141 GB, 4.8 TB/s and 900 GB/s. HGX B200 has 180 GB, 8 TB/s and 1,800 GB/s. The DGX
# systems have 400 Gb/s of network a card. Memory and its bandwidth are what the driver shows to XLA
# (openxla/xla, target_config/specs).
CHIPS = {
    "v4": Chip("TPU v4", "tpu", int(31.7 * GIB), 1.2e12, 50e9, 3, 6.25e9, 4, 1, 1.049e9),
    "v5e": Chip("TPU v5 lite", "tpu", int(15.75 * GIB), 819e9, 50e9, 2, 3.125e9, 4, 1, 1.503e9),
    "v5p": Chip("TPU v5", "tpu", int(95.74 * GIB), 2765e9, 100e9, 3, 6.25e9, 4, 1, 1.751e9),
    "v6e": Chip("TPU v6 lite", "tpu", int(31.25 * GIB), 1638e9, 100e9, 2, 12.5e9, 4, 1, 1.751e9),
    "TPU7x": Chip("TPU7x", "tpu", int(94.75 * GIB), 3690e9, 100e9, 3, 6.25e9, 8, 2, 2.2e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", "gpu", 84_942_979_072, 3352.32e9, 450e9, 0, 50e9, 8),
    "h200": Chip("NVIDIA H200", "gpu", 151_397_597_184, 4800e9, 450e9, 0, 50e9, 8),
    "b200": Chip("NVIDIA B200", "gpu", 191_514_411_008, 7672.32e9, 900e9, 0, 50e9, 8),
}


def _find_peaks(device_kind: str) -> tuple[float | None, float | None]:
    """Returns the row of PEAKS for a kind: bf16 and fp8. Both are None without a row."""
    rows = (peaks for pattern, *peaks in PEAKS if re.fullmatch(pattern, device_kind))
    wide, narrow = next(rows, (None, None))
    return wide, narrow


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bf16 FLOP/s of one JAX device, or None for a kind without a row.

    CPUs have no row.
    """
    return _find_peaks(device_kind)[0]


def peak_fp8_flops(device_kind: str) -> float | None:
    """Returns the dense fp8 FLOP/s of one JAX device, or None where XLA has to emulate fp8.

    It is None for a kind without a row, too.
    """
    return _find_peaks(device_kind)[1]


def measure_cpu_peak(
    size: int = 1024, repeats: int = 5, now: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the float32 FLOP/s of this process's CPU, measured in about 0.2 s.

    It is the best of `repeats` jitted matmuls `[size, size]`. A CPU's MFU therefore means
    "relative to a plain matmul here", and can pass 1.
    """
    one_device = jax.sharding.Mesh(jax.local_devices(backend="cpu")[:1], ("data",))
    best = float("inf")

    # The yardstick is one plain matmul, whatever mesh the caller is in.
    with jax.set_mesh(one_device):
        x = jnp.ones((size, size), jnp.float32)
        matmul = jax.jit(jnp.dot)
        jax.block_until_ready(matmul(x, x))  # The first call compiles.

        for _ in range(repeats):
            start = now()
            jax.block_until_ready(matmul(x, x))
            best = min(best, now() - start)

    return 2.0 * size**3 / best


@cache
def find_cpu_peak() -> float:
    """`measure_cpu_peak()`, measured once by a process, however many runs it makes."""
    return measure_cpu_peak()


@dataclass(frozen=True)
class Peak:
    """What MFU is relative to."""

    flops: float | None  # FLOP/s of all the run's devices together; None if nobody knows.
    line: str  # A line for people that says so.


def find_peak(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # It is a class.
    measure: Callable[[], float] = find_cpu_peak,
) -> Peak:
    """Returns the peak of a run on `devices`, which are those of all processes.

    It comes from the table. On CPUs it is measured once, here, and counted for each process,
    because the fake devices of a process share its cores.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        processes = len({device.process_index for device in devices})
        one = measure()
        many = f" x {processes} processes" if processes > 1 else ""
        line = f"peak measured: {one / 1e9:,.1f} GFLOP/s, float32 matmul on this CPU{many}"
        return Peak(one * processes, line)

    one = peak_flops(kind)
    if one is None:
        line = (
            f"peak unknown for {kind!r}: MFU is not reported; "
            "add a row to gpt_jax/hardware/chips.py PEAKS"
        )
        return Peak(None, line)

    count = len(devices)
    line = f"peak assumed: {one / 1e12:,.1f} TFLOP/s dense bf16 x {count} {kind}"
    return Peak(one * count, line)
