"""Buffers of mixtures of experts on one device: rows that a token fills, and rows that stay empty.

Tokens travel to their experts through an exchange (model/experts/exchange.py). Without a grouped
matmul, each expert's tokens are then gone through block by block (model/experts/local_experts.py).
"""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.model import choose_block_rows
from gpt_jax.plan.job import PlanJob, Widths, device_bytes

# Sizes of the axes that cut no weight of experts where it is multiplied.
GATHERED = {"fsdp": 1, "context": 1, "pipeline": 1}


class Blocks(NamedTuple):
    """How a device goes through its experts' tokens."""

    experts: int  # Experts of the device.
    choices: float  # Choices of experts that the device's tokens make.
    rows: int  # Rows of one block.


def is_blockwise(config: configs.Config, platform: str) -> bool:
    """Returns whether experts are gone through block by block."""
    asked = config.compute.expert_matmul
    way = configs.find_habits(platform).expert_matmuls[0] if asked == "auto" else asked
    return config.model.dispatch == "dropless" and way == "blocks"


def find_blocks(
    model: configs.Model, shape: dict[str, int], tokens: float, platform: str
) -> Blocks:
    """Returns the blocks of a device with so many tokens."""
    experts = max(1, model.experts // shape["expert"])
    choices = tokens * model.experts_per_token
    sum_rows = configs.find_habits(platform).sum_rows
    return Blocks(experts, choices, choose_block_rows(int(choices), experts, sum_rows))


def count_padding(
    config: configs.Config, shape: dict[str, int], tokens: float, platform: str
) -> float:
    """Returns the rows of blocks that may be empty, for each choice of a device's tokens."""
    if not is_blockwise(config, platform):
        return 0.0
    blocks = find_blocks(config.model, shape, tokens, platform)
    return blocks.experts * blocks.rows / blocks.choices


def count_turns(job: PlanJob, shape: dict[str, int], tokens: float, platform: str) -> float:
    """Returns the blocks of one expert that a device's tokens fill, half of the last one empty.

    It is 1 where nothing goes by blocks.
    """
    config = job.config
    if not is_blockwise(config, platform) or not any(widths.sent for widths in job.layers):
        return 1.0
    blocks = find_blocks(config.model, shape, tokens, platform)
    return blocks.choices / blocks.experts / blocks.rows + 0.5


def count_exchange_places(model: configs.Model, shape: dict[str, int]) -> float:
    """Returns the places in the exchange of tokens with experts, for each choice.

    Over an axis expert `dropless` has places for all tokens that may come.
    """
    if model.dispatch == "capacity":
        return model.capacity_factor
    if shape["expert"] == 1:
        return 1.0
    most = min(model.experts_per_token, model.experts // shape["expert"])
    return shape["expert"] * most / model.experts_per_token


def count_places(
    config: configs.Config, shape: dict[str, int], tokens: float, platform: str
) -> float:
    """Returns the places of a device's buffers, for each choice of its tokens."""
    padding = count_padding(config, shape, tokens, platform)
    return count_exchange_places(config.model, shape) + padding


def widen_for_buffers(
    widths: Widths, config: configs.Config, places: float, platform: str
) -> Widths:
    """Returns `widths` as they stand in memory; those of experts are `places` times as wide.

    Where experts are gone through block by block, their hidden values are those of one block.
    """
    if not widths.sent:
        return widths
    shared = config.model.shared_experts
    sent = 0.0 if is_blockwise(config, platform) else places * widths.sent
    grow = (sent + shared) / (widths.sent + shared)
    return widths._replace(
        inner=widths.inner * grow, hidden=widths.hidden * grow, sent=widths.sent * places
    )


def expert_weight_bytes(job: PlanJob, shape: dict[str, int], bytes_each: int) -> float:
    """Returns the bytes of all layers' experts as a device multiplies with them."""
    return device_bytes(job, shape | GATHERED, "params", 3, "expert", bytes_each)
