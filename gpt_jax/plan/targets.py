"""Graphics cards as XLA's compiler wants them described (called by compiled.py).

A text GpuTargetConfigProto. Names, memories and bandwidths are those of devices.CHIPS; the other
numbers: NVIDIA's data sheets and CUDA programming guide (limits by compute capability), as the
driver reports them.
"""

from typing import NamedTuple

from gpt_jax.hardware import CHIPS


class Card(NamedTuple):
    """What only the compiler asks for."""

    capability: tuple[int, int]
    cores: int
    l2: int
    clock: float  # GHz


CARDS = {
    "h100": Card((9, 0), 132, 52_428_800, 1.98),
    "h200": Card((9, 0), 132, 52_428_800, 1.98),
    "b200": Card((10, 0), 148, 132_644_864, 1.965),
}
LIMITS = dict(  # the same on Hopper and Blackwell
    threads_per_block_limit=1024,
    threads_per_warp=32,
    shared_memory_per_block=49_152,
    shared_memory_per_core=233_472,
    threads_per_core_limit=2048,
    fpus_per_core=128,
    block_dim_limit_x=2_147_483_647,
    block_dim_limit_y=65_535,
    block_dim_limit_z=65_535,
    shared_memory_per_block_optin=232_448,
    registers_per_core_limit=65_536,
    registers_per_block_limit=65_536,
)


def text(name: str) -> str:
    """The description of a card of CARDS. cuDNN's version is that of the wheel that jax[cuda13]
    brings (9)."""
    card, chip = CARDS[name], CHIPS[name]
    info = LIMITS | dict(
        core_count=card.cores,
        memory_bandwidth=round(chip.bandwidth),
        l2_cache_size=card.l2,
        clock_rate_ghz=card.clock,
        device_memory_size=chip.shown,
    )
    lines = "\n".join(f"  {key}: {value}" for key, value in info.items())
    major, minor = card.capability
    return (
        f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        f'device_description_str: "{chip.kind}"\n'
    )
