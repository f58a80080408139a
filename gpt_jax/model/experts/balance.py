"""What mixtures of experts report, layer by layer and row by row (called by transformer).

Every number is a sum over a row of a batch, so that it is the same however rows are grouped into
microbatches, stages and devices. Shapes: B batch, L layers, E experts.
"""

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding


def empty_report(model: config.Model, rows: int) -> dict[str, jax.Array]:
    """Zeros for `rows` rows; {} for a model without experts. `objective` [B]: what is added to
    the objective; `tokens` [B]: real tokens, once for each layer of experts, the weight of the
    rest; `balance`, `router_z` [B] (see moe.make_stats) and `dropped` [B], the part of each
    token's choices that no expert took; `load` [B, L, E]: the tokens that each expert was sent."""
    if all(spec.ffn != "moe" for spec in config.layer_specs(model)):
        return {}

    def zeros(*shape):
        return sharding.constrain(jnp.zeros((rows, *shape)), "batch", *(None,) * len(shape))

    return {name: zeros() for name in ("objective", "tokens", "balance", "router_z", "dropped")} | {
        "load": zeros(model.layers, model.experts)
    }


def add_layer(report: dict, stats: dict, model: config.Model, layer) -> dict:
    """`report` with the `stats` of one layer's experts; those of a dense layer are {}."""
    if not stats:
        return report
    load = stats["load"]  # [B, E]
    here = (jnp.arange(model.layers) == layer)[:, None]
    added = {name: report[name] + stats[name] for name in ("balance", "router_z")}
    objective = model.router_z_loss * stats["router_z"]
    if model.balance == "aux":
        objective = objective + model.balance_weight * stats["balance"]
    elif model.balance == "bias":
        objective = objective + stats["steer"]  # 0: it is there for its gradient
    return added | {
        "objective": report["objective"] + objective,
        "dropped": report["dropped"] + stats["dropped"] / model.experts_per_token,
        "tokens": report["tokens"] + load.sum(-1) / model.experts_per_token,
        "load": report["load"] + jnp.where(here, load[:, None], 0),
    }
