"""The keys of mixtures of experts: which layers they are, and how wide."""

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.interop.keys import Key, count_layers, shorten, take


def _read_qwen_layers(values):
    """The layers of Qwen3-MoE that are mixtures of experts, and their sizes."""
    layers = count_layers(values)
    dense = values.get("mlp_only_layers") or []
    step = take(values, "decoder_sparse_step", 1)
    if step < 1:
        raise UsageError(f"config.json: decoder_sparse_step = {step!r} is not 1 or more")
    experts = values.get("num_experts") or take(values, "num_local_experts")

    def kind(i):
        return "swiglu" if i in dense or (i + 1) % step else "moe"

    pattern = tuple(("attention", kind(i)) for i in range(layers))
    return {"pattern": shorten(pattern), "experts": experts}


def _write_qwen_layers(model):
    kinds = [spec.ffn for spec in config.layer_specs(model)]
    return {
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind != "moe"],
        "decoder_sparse_step": 1,
        "num_experts": model.experts,
    }


QWEN_LAYERS = Key(
    ("mlp_only_layers", "decoder_sparse_step", "num_experts", "num_local_experts"),
    _read_qwen_layers,
    _write_qwen_layers,
)


def _read_mixtral_width(values):
    width = take(values, "intermediate_size")
    return {"mlp": width, "expert_mlp": width, "pattern": (("attention", "moe"),)}


MIXTRAL_WIDTH = Key(
    ("intermediate_size",),
    _read_mixtral_width,
    lambda model: {"intermediate_size": model.expert_mlp},
)
