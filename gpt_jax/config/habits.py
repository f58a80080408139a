"""How each platform computes the same thing fastest: one row of habits for each.

Results do not depend on a row, except for rounding. Code that is traced for a mesh reads its row
through `sharding.habits()`. Plans and the notes of a run name the platform and call `find_habits`.
"""

from typing import NamedTuple

from gpt_jax.errors import UsageError


class Habits(NamedTuple):
    """What a program does differently on one platform.

    - `join_projections`: whether linear maps of one input become one matmul (layers/linear.py).
    - `pin_layouts`: whether a gathered weight keeps the layout in which it is stored
      (sharding/layout.py).
    - `expert_matmuls`: the ways in which experts can multiply their tokens, of EXPERT_MATMULS. The
      first is taken unless another is asked for (experts/local_experts.py).
    - `sum_rows`: how many rows a block of an expert needs until its matmuls take as long as adding
      up its gradients. It has no meaning except for `blocks`.
    - `ragged_exchange`: whether devices send each other only the tokens that exist
      (experts/exchange.py).
    - `rotate_by_matmul`: whether rotary positions in bfloat16 bring channels to their partners by a
      matmul (layers/positions.py).
    - `split_heads`: whether matmuls to and from heads have a dim for the heads, where the heads'
      width is a multiple of this (layers/linear.py). 0 means that they have none.
    """

    name: str
    join_projections: bool
    pin_layouts: bool
    expert_matmuls: tuple[str, ...]
    sum_rows: int
    ragged_exchange: bool
    rotate_by_matmul: bool
    split_heads: int


# `sum_rows`: a weight costs 24 bytes a block, and 22 FLOPs a row, forward and backward. The GPU's
# number comes from the data sheets of H100 and H200 at 0.75 of the peak, and is not measured. The
# CPU's number comes from 20 GB/s and 150 GFLOP/s.
CPU = Habits("cpu", True, False, ("blocks",), 8, False, False, 0)
GPU = Habits("gpu", False, True, ("blocks",), 200, True, False, 0)
TPU = Habits("tpu", False, False, ("sorted",), 0, True, True, 128)
# `split_heads`: a TPU fills the last dim of an array up to 128 entries, so that narrower heads with
# a dim of their own would take more memory.
# Triton's kernels compile for A100, H100 and B200, and are right where they are interpreted. They
# ran on no GPU yet, so they have to be asked for.
GROUPED_GPU = GPU._replace(expert_matmuls=("blocks", "grouped"))
# libtpu 0.0.42 refuses the ragged exchange on v5e beyond 16 chips ("not supported in limited ICI
# routing settings").
TPU_V5E = TPU._replace(name="tpu v5e", ragged_exchange=False)

# Widths of experts that `grouped` multiplies are divisible by this.
GROUPED_WIDTH = 16

PLATFORM_HABITS = {"cpu": CPU, "gpu": GPU, "tpu": TPU}

# Kinds of device that differ from their platform.
KIND_HABITS = {"TPU v5 lite": TPU_V5E, "TPU v5e": TPU_V5E}
# Families of GPUs that differ from their platform, by how the names of their kinds begin. They have
# tensor cores for bfloat16, and at least 96 KiB of shared memory for a kernel.
FAMILY_HABITS = dict.fromkeys(
    ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200", "NVIDIA B200"), GROUPED_GPU
)


def find_habits(platform: str, kind: str = "") -> Habits:
    """Finds the row of a platform (cpu, gpu or tpu) and, if it has its own, of a kind of device.

    Raises UsageError for any other platform.
    """
    if kind in KIND_HABITS:
        return KIND_HABITS[kind]
    for family, habits in FAMILY_HABITS.items():
        if kind.startswith(family):
            return habits
    if platform not in PLATFORM_HABITS:
        known = ", ".join(PLATFORM_HABITS)
        raise UsageError(
            f"platform {platform!r} of JAX: expected one of {known}; "
            "set JAX_PLATFORMS=cpu to run on the CPU"
        )
    return PLATFORM_HABITS[platform]


def choose_expert_matmul(asked: str, habits: Habits, kind: str) -> Habits:
    """Returns `habits` with the one way of experts' matmuls that `asked` means on them.

    `asked` is a value of compute.expert_matmul. Raises UsageError if a `kind` of device with these
    habits does not have the way that was asked for.
    """
    ways = habits.expert_matmuls
    if asked == "auto":
        return habits._replace(expert_matmuls=ways[:1])
    if asked not in ways:
        known = " or ".join(ways)
        raise UsageError(
            f"config.compute.expert_matmul = {asked!r}: {kind} does not have it; "
            f"choose auto or {known}"
        )
    return habits._replace(expert_matmuls=(asked,))


EXPERTS_TEXTS = {
    "blocks": "experts by blocks",
    "sorted": "experts by sorting",
    "grouped": "experts by Triton's grouped matmul",
}


def describe_habits(habits: Habits, has_experts: bool, has_exchange: bool) -> str:
    """One line about a row, as far as the model and the mesh let it matter."""
    parts = ["projections joined" if habits.join_projections else "projections one by one"]
    if habits.pin_layouts:
        parts.append("gathered weights in their stored layout")
    if habits.rotate_by_matmul:
        parts.append("rotary positions by matmul")
    if habits.split_heads:
        parts.append("projections by heads")
    if has_experts:
        way, *others = habits.expert_matmuls
        more = f" (compute.expert_matmul can be {', '.join(others)})" if others else ""
        parts.append(EXPERTS_TEXTS[way] + more)
    if has_exchange:
        parts.append("ragged exchange" if habits.ragged_exchange else "padded exchange")
    return f"habits of {habits.name}: {', '.join(parts)}"
