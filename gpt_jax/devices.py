"""What the hardware could do and what the model asks of it: peak FLOP/s, FLOPs a token, MFU (floor 0).

Called by gpt_jax/experiment.py and the planner. A device that is not in the table has no peak, so its MFU is not
reported: a number under a guessed peak is worse than none. On a CPU the peak is measured, in float32.
"""

import re
import time
from dataclasses import dataclass
from typing import Callable, Sequence

import jax
import jax.numpy as jnp

# Dense bfloat16 peak in FLOP/s of one JAX device, found by a full match of its `device_kind`; the first row wins.
# Sources. TPU: Google Cloud's "system architecture" page of each generation (peak compute per chip, bf16); kinds as in
# jax/_src/pallas/mosaic/tpu_info.py. v4 and v5p are one device a chip (megacore); TPU7x is two a chip of 2,307e12.
# NVIDIA: data sheets of A100, H100, H200, GH200, HGX B200 and GB200 NVL72; from H100 on they print the figure with
# 2:4 sparsity, which is halved here (SXM 1,979e12, PCIe 1,513e12, NVL 1,671e12, B200 4.5e15, GB200 5e15).
# AMD: MI300X data sheet, peak bfloat16 without sparsity.
# A MIG slice carries the card's name plus " MIG …" and has no row: it is a fraction of the card that we do not know.
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


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this kind; None when the table does not know it (CPUs included)."""
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, device_kind)), None)


def measure_cpu_peak(size: int = 1024, repeats: int = 5, now: Callable[[], float] = time.perf_counter) -> float:
    """float32 FLOP/s of this process's CPU: the best of `repeats` jitted `[size, size]` matmuls (about 0.2 s).

    An achieved rate, not a data-sheet one, so MFU on a CPU means "relative to a plain matmul here" and can pass 1."""
    one_device = jax.sharding.Mesh(jax.local_devices(backend="cpu")[:1], ("data",))
    best = float("inf")
    with jax.set_mesh(one_device):  # whatever mesh the caller is in, the yardstick is one plain matmul
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
    """What MFU is relative to: FLOP/s of all the run's devices together (None: unknown), and a line that says so."""

    flops: float | None
    line: str


def find_peak(devices: Sequence[jax.Device], measure: Callable[[], float] = measure_cpu_peak) -> Peak:
    """The peak of a run on `devices` (all processes'), assumed from the table or, on CPUs, measured once here.

    Fake CPU devices share their process's cores, so a CPU peak counts processes, not devices."""
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        processes = len({d.process_index for d in devices})
        one = measure()
        many = f" x {processes} processes" if processes > 1 else ""
        return Peak(one * processes, f"peak measured: {one / 1e9:,.1f} GFLOP/s, float32 matmul on this CPU{many}")
    one = peak_flops(kind)
    if one is None:
        return Peak(None, f"peak unknown for {kind!r}: MFU is not reported; add a row to gpt_jax/devices.py PEAKS")
    return Peak(one * count, f"peak assumed: {one / 1e12:,.1f} TFLOP/s dense bf16 x {count} {kind}")


def flops_per_token(matmul_params: int, windows: Sequence[int], attention_width: int, seq_len: int,
                    causal: bool = False) -> int:
    """Training FLOPs (forward and backward) of one token: `6 N + sum over layers of 12 width min(window or T, T)`.

    `matmul_params`: N, every weight that is multiplied (looked-up embeddings excluded). `windows`: one entry a layer, 0
    meaning all of T. `attention_width`: heads * head_dim. The attention term counts the full T x T map, or the whole
    window at every token, as PaLM (2204.02311, appendix B), nanochat and Megatron do; `causal` counts the keys that
    there are, `w - w^2 / 2T` on average for a reach of w, which for w = T is the half that MaxText counts."""
    reaches = [min(window or seq_len, seq_len) for window in windows]
    keys = sum(reach - reach**2 / (2 * seq_len) if causal else reach for reach in reaches)
    return 6 * matmul_params + round(12 * attention_width * keys)


def mfu(token_flops: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of a whole run: all its tokens a second over all its devices' `peak`."""
    return None if peak is None else token_flops * tokens_per_second / peak


def mfu_metrics(full_flops: float, causal_flops: float, tokens_per_second: float,
                peak: float | None) -> dict[str, float]:
    """Both conventions as metrics; empty when the peak is unknown, so that the keys are absent rather than wrong."""
    if peak is None:
        return {}
    return {"throughput/mfu_full": mfu(full_flops, tokens_per_second, peak),
            "throughput/mfu_causal": mfu(causal_flops, tokens_per_second, peak)}
