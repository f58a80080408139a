"""Bytes, seconds, meshes and verdicts in words."""

from gpt_jax import config as configs
from gpt_jax.hardware import GIB, GPU_FRACTION
from gpt_jax.plan.topology import Topology


def format_size(count: float) -> str:
    """Returns bytes for people, as in "31.25 GiB"."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def format_seconds(value: float) -> str:
    """Returns seconds for people, as in "1.25 s" or "12.5 ms"."""
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value / 1e-3:.1f} ms"
    return f"{value * 1e6:.3g} us" if value else "0 s"


def format_mesh(shape: dict[str, int], zero: int = 3) -> str:
    """Returns the axes of a mesh, as in "data 2 x fsdp 4".

    It also names `zero` if that is not 3 and some axis could cut the weights.
    """
    axes = [f"{axis} {size}" for axis, size in shape.items() if size > 1]
    text = " x ".join(axes) or "one device"
    is_cut = any(shape[axis] > 1 for axis in configs.FSDP_AXES)
    return f"{text}, zero {zero}" if zero != 3 and is_cut else text


def format_verdict(peak: float, topology: Topology) -> str:
    """Returns a verdict, as in "fits: peak 31.2 of 95.7 GiB".

    On GPUs it says which part of the card may be filled.
    """
    fits = "fits" if peak <= topology.chip.memory else "does not fit"
    part = f" ({GPU_FRACTION} of the card)" if topology.chip.platform == "gpu" else ""
    used = f"{peak / GIB:.1f}" if peak >= GIB / 10 else f"{peak / GIB:.2g}"
    return f"{fits}: peak {used} of {topology.chip.memory / GIB:.1f} GiB{part}"
