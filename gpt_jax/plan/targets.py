"""Graphics cards, described as XLA's compiler wants them: a GpuTargetConfigProto as text.

Names, memories and bandwidths are those of hardware's CHIPS. The other numbers come from NVIDIA's
data sheets and CUDA programming guide (limits by compute capability), as the driver reports them.
"""

from typing import NamedTuple

from gpt_jax.hardware import CHIPS


class Card(NamedTuple):
    """What only the compiler asks for."""

    capability: tuple[int, int]  # Major and minor.
    cores: int
    l2: int  # Bytes.
    clock: float  # GHz.


CARDS = {
    "h100": Card((9, 0), 132, 52_428_800, 1.98),
    "h200": Card((9, 0), 132, 52_428_800, 1.98),
    "b200": Card((10, 0), 148, 132_644_864, 1.965),
}
# Hopper and Blackwell have the same limits.
LIMITS = dict(
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


def describe_card(name: str) -> str:
    """Returns the description of a card of CARDS.

    The version of cuDNN is that of the wheel that jax[cuda13] brings.
    """
    card = CARDS[name]
    chip = CHIPS[name]
    info = LIMITS | dict(
        core_count=card.cores,
        memory_bandwidth=round(chip.bandwidth),
        l2_cache_size=card.l2,
        clock_rate_ghz=card.clock,
        device_memory_size=chip.shown,
    )
    major, minor = card.capability

    lines = [
        "gpu_device_info {",
        *(f"  {key}: {value}" for key, value in info.items()),
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
        "}",
        'platform_name: "CUDA"',
        "dnn_version_info { major: 9 minor: 10 patch: 0 }",
        f'device_description_str: "{chip.kind}"',
        "",
    ]
    return "\n".join(lines)
