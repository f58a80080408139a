"""What mixtures of experts report, layer by layer and row by row.

Every number is a sum over a row of a batch. It is therefore the same however rows are grouped into
microbatches, stages and devices.

Shapes: B batch, L layers, E experts.
"""

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding


def empty_report(model: config.Model, rows: int) -> dict[str, jax.Array]:
    """Makes a report of zeros for `rows` rows, or {} for a model without experts.

    - `objective` [B] is what is added to the objective.
    - `tokens` [B] counts real tokens once for each layer of experts. It is the weight of the rest.
    - `balance` and `router_z` [B] are described in `moe.make_stats`.
    - `dropped` [B] is the part of each token's choices that no expert took.
    - `load` [B, L, E] counts the tokens that each expert was sent.
    """
    if not config.has_experts(model):
        return {}

    def zeros(*shape):
        return sharding.constrain(jnp.zeros((rows, *shape)), "batch", *[None] * len(shape))

    names = ("objective", "tokens", "balance", "router_z", "dropped")
    report = {name: zeros() for name in names}
    return report | {"load": zeros(model.layers, model.experts)}


def add_layer(report: dict, stats: dict, model: config.Model, layer) -> dict:
    """Adds the `stats` of one layer's experts to `report`. Those of a dense layer are {}."""
    if not stats:
        return report

    load = stats["load"]  # [B, E]
    is_here = (jnp.arange(model.layers) == layer)[:, None]
    added = {name: report[name] + stats[name] for name in ("balance", "router_z")}
    objective = model.router_z_loss * stats["router_z"]
    if model.balance == "aux":
        objective = objective + model.balance_weight * stats["balance"]
    elif model.balance == "bias":
        # The value of `steer` is 0. The objective needs its gradient.
        objective = objective + stats["steer"]

    return added | {
        "objective": report["objective"] + objective,
        "dropped": report["dropped"] + stats["dropped"] / model.experts_per_token,
        "tokens": report["tokens"] + load.sum(-1) / model.experts_per_token,
        "load": report["load"] + jnp.where(is_here, load[:, None], 0),
    }
