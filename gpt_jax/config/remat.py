"""What `compute.remat = "names"` may keep of a layer: one row for each value that has a name."""

from typing import NamedTuple

from gpt_jax.config.layers import layer_specs
from gpt_jax.config.model_fields import Compute, Model


class Named(NamedTuple):
    """A value of a layer that the model marks with `jax.ad_checkpoint.checkpoint_name`.

    `layers` says which layers have it: "all", "dense" or "experts". Shared experts are dense.
    """

    text: str
    layers: str


REMAT_NAMES = {
    "layer_in": Named("the stream that comes into the layer", "all"),
    "q": Named("queries as they are projected", "all"),
    "k": Named("keys as they are projected", "all"),
    "v": Named("values as they are projected", "all"),
    "attention": Named("what the attention kernel gives", "all"),
    "attention_out": Named("attention's output projection", "all"),
    "mlp_in": Named("the feed-forward's first matmuls, up and gate", "dense"),
    "mlp_hidden": Named("what goes into the feed-forward's last matmul", "dense"),
    "mlp_out": Named("the feed-forward's last matmul", "dense"),
    "experts_in": Named("tokens at their experts", "experts"),
    "experts_out": Named("experts' outputs before they are weighted", "experts"),
}


def list_marked(model: Model) -> list[str]:
    """The names of REMAT_NAMES that a layer of the model has."""
    kinds = {"all"}
    for spec in layer_specs(model):
        is_sparse = spec.ffn == "moe"
        if is_sparse:
            kinds.add("experts")
        if not is_sparse or model.shared_experts:
            kinds.add("dense")
    return [name for name, row in REMAT_NAMES.items() if row.layers in kinds]


def list_unread(model: Model) -> list[str]:
    """The names that the model's backward pass does not read.

    The residual's sum reads neither of its terms, so a branch's output is read by a norm alone.
    """
    if model.norm_position != "pre":
        return []
    return ["attention_out", "mlp_out"] if model.parallel else ["mlp_out"]


def describe_remat(compute: Compute) -> str:
    """The remat policy in words, such as `names (q, k; on the host layer_in)`."""
    if compute.remat != "names":
        return compute.remat
    parts = []
    if compute.remat_save:
        parts.append(", ".join(compute.remat_save))
    if compute.remat_offload:
        parts.append(f"on the host {', '.join(compute.remat_offload)}")
    return f"names ({'; '.join(parts)})"
