"""What the hardware could do and what the model asks of it: peaks, memories, links; FLOPs a token,
MFU (floor 0).

Called by gpt_jax/run/parts.py and the planner. A device that is not in the table has no peak, so
its MFU is not reported: a number under a guessed peak is worse than none. On a CPU the peak is
measured, in float32.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Dense bfloat16 peak in FLOP/s of one JAX device, found by a full match of its `device_kind`; the
# first row wins. Sources. TPU: Google Cloud's "system architecture" page of each generation (peak
# compute per chip, bf16); kinds as in jax/_src/pallas/mosaic/tpu_info.py. v4 and v5p are one device
# a chip (megacore); TPU7x is two a chip of 2,307e12. NVIDIA: data sheets of A100, H100, H200,
# GH200, HGX B200 and GB200 NVL72; from H100 on they print the figure with 2:4 sparsity, which is
# halved here (SXM 1,979e12, PCIe 1,513e12, NVL 1,671e12, B200 4.5e15, GB200 5e15). AMD: MI300X data
# sheet, peak bfloat16 without sparsity. A MIG slice carries the card's name plus " MIG …" and has
# no row: it is a fraction of the card that we do not know.
PEAKS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 2307e12 / 2),
    (r"NVIDIA A100(-SXM4-\d+GB|-PCI[Ee]-\d+GB| \d+GB PCIe)?", 312e12),
    (r"NVIDIA H100 PCIe", 756.5e12),
    (r"NVIDIA H[12]00 NVL", 835.5e12),
    (r"NVIDIA H100( \d+GB HBM[23]e?)?", 989e12),
    (r"NVIDIA H200( \d+GB HBM3e?)?", 989e12),
    (r"NVIDIA GH200 (120|144|480)GB", 989e12),
    (r"NVIDIA B200( \d+GB HBM3e)?", 2250e12),
    (r"NVIDIA GB200( \d+GB HBM3e)?", 2500e12),
    (r"AMD Instinct MI300X( OAM)?", 1307.4e12),
)


@dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind has, for `gpt-jax plan`. Bytes, bytes a second and one
    direction throughout."""

    kind: str  # `device_kind`, a key of PEAKS
    platform: str  # tpu or gpu
    shown: int  # of memory. TPU: what libtpu lets a program fill; GPU: what the driver shows
    bandwidth: float  # of that memory
    link: float  # of one ICI link; GPUs: NVLink of one GPU in all
    dims: int  # of the torus; 0: a switch
    network: float  # to other slices (TPU) or hosts (GPU)
    per_host: int  # devices of a host
    per_chip: int = 1  # devices of a chip
    clock: float = 0.0  # Hz of the compiler's cycles; TPU

    @property
    def memory(self) -> int:
        """What a program may fill."""
        return int(self.shown * (GPU_FRACTION if self.platform == "gpu" else 1))


GIB = 2**30
# Of a card's memory, taken by commands/environment.py at the start (JAX by itself takes 0.75): the
# rest is for CUDA, its libraries and NCCL's buffers. An environment that sets
# XLA_CLIENT_MEM_FRACTION is left alone.
GPU_FRACTION = 0.9
# By the name that --topology takes. Sources: TPU memory: what libtpu 0.0.42 says a program may use
# when it refuses a larger one; v4, whose two cores JAX drives as
# one device, from the data sheet less what v5p keeps back. TPU bandwidths: the tables of Google
# Cloud's pages v4, v5e, v5p, v6e and TPU7x: memory 1,200, 819, 2,765, 1,638 and
# 7,380 GB/s a chip; ICI both ways a chip 600, 400, 1,200, 800 and 1,200 GB/s, over 6 links (3-D
# torus) or 4 (2-D);
# data centre network 50, 25, 50, 100 and 100 Gb/s a chip. TPU7x: half of the chip's a device. TPU
# clocks: peak of PEAKS / (2 x rows x columns x arrays of the matrix units: 8 of 128 x 128 on v4 and
# v5p, 4 on v5e,
# 4 of 256 x 256 on v6e and TPU7x). An 8,192-cubed matmul was compiled for each: its cycles give 70
# to 90 % of that. GPUs: data sheets of H100 SXM (80 GB, 3.35 TB/s, NVLink 900 GB/s both ways), H200
# SXM (141 GB, 4.8 TB/s, 900) and HGX
# B200 (180 GB, 8 TB/s, 1,800), and the DGX systems' 400 Gb/s of network a GPU. Memory and its
# bandwidth: what the
#   driver shows to XLA (openxla/xla, target_config/specs).
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


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this kind; None when the table does not know it
    (CPUs included)."""
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, device_kind)), None)


def measure_cpu_peak(
    size: int = 1024, repeats: int = 5, now: Callable[[], float] = time.perf_counter
) -> float:
    """float32 FLOP/s of this process's CPU: the best of `repeats` jitted `[size, size]` matmuls
    (about 0.2 s).

    An achieved rate, not a data-sheet one, so MFU on a CPU means "relative to a plain matmul
    here" and can pass 1."""
    one_device = jax.sharding.Mesh(jax.local_devices(backend="cpu")[:1], ("data",))
    best = float("inf")
    with jax.set_mesh(
        one_device
    ):  # whatever mesh the caller is in, the yardstick is one plain matmul
        x = jnp.ones((size, size), jnp.float32)
        matmul = jax.jit(jnp.dot)
        jax.block_until_ready(matmul(x, x))  # compile
        for _ in range(repeats):
            start = now()
            jax.block_until_ready(matmul(x, x))
            best = min(best, now() - start)
    return 2.0 * size**3 / best


@dataclass(frozen=True)
class Peak:
    """What MFU is relative to: FLOP/s of all the run's devices together (None: unknown), and a
    line that says so."""

    flops: float | None
    line: str


def find_peak(
    devices: Sequence[jax.Device], measure: Callable[[], float] = measure_cpu_peak
) -> Peak:
    """The peak of a run on `devices` (all processes'), assumed from the table or, on CPUs, measured
    once here.

    Fake CPU devices share their process's cores, so a CPU peak counts processes, not devices."""
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        processes = len({d.process_index for d in devices})
        one = measure()
        many = f" x {processes} processes" if processes > 1 else ""
        return Peak(
            one * processes,
            f"peak measured: {one / 1e9:,.1f} GFLOP/s, float32 matmul on this CPU{many}",
        )
    one = peak_flops(kind)
    if one is None:
        return Peak(
            None,
            f"peak unknown for {kind!r}: MFU is not reported; add a row to gpt_jax/hardware/chips.py PEAKS",
        )
    return Peak(one * count, f"peak assumed: {one / 1e12:,.1f} TFLOP/s dense bf16 x {count} {kind}")
