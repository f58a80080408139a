"""The families of models that others publish: one table each, of keys and of tensors.

Names and rules are those of Hugging Face `transformers`. Shapes of what has a layout of its own
stand in rows.py.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.interop.expert_keys import MIXTRAL_WIDTH, QWEN_LAYERS
from gpt_jax.interop.keys import (
    GATED,
    LAYER_WINDOWS,
    ONE_WINDOW,
    PLAIN,
    SWITCHED_WINDOW,
    SWITCHED_WINDOWS,
    Key,
    activation,
    choice,
    field,
    must,
    size,
    take,
    take_switch,
)
from gpt_jax.interop.names import (
    ATTENTION,
    BRANCH_NORMS,
    GPT2_ROWS,
    GUIDE_ROWS,
    LLAMA_ROWS,
    MIXTRAL_EXPERTS,
    MLP,
    NEOX_ROWS,
    PHI3_ROWS,
    PRE_NORMS,
    QWEN_EXPERTS,
    SANDWICH_NORMS,
    TABLES,
    transpose_rows,
)
from gpt_jax.interop.rope_keys import ROPE, TWO_ROPES
from gpt_jax.interop.rows import Row


class Family(NamedTuple):
    """A family of models.

    `architecture` is its class in transformers. `fixed` are fields of ours that all its models
    have. `defaults` are what transformers takes for keys that are not in a config, where we have
    no other default. `base` is the prefix that files of the model without its head leave out.
    Tensors whose names end with one of `leftovers` hold nothing that was learned. A family that is
    not `is_written` can only be read.
    """

    name: str
    architecture: str
    fixed: Mapping[str, Any]
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]
    base: str = "model."
    is_written: bool = True
    leftovers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    defaults: Mapping[str, Any] = MappingProxyType({})


# ---- keys that several families share ----

SIZES = (
    size("hidden_size", "embed"),
    size("num_hidden_layers", "layers"),
    size("num_attention_heads", "heads"),
    size("vocab_size", "vocab"),
    size("max_position_embeddings", "max_seq"),
)
HEADS = (field("num_key_value_heads", "kv_heads", 0), field("head_dim", "head_dim", 0))
EPSILON = field("rms_norm_eps", "norm_epsilon", 1e-6)
UNTIED = field("tie_word_embeddings", "tied", False)
TIED = field("tie_word_embeddings", "tied", True)
SWIGLU = (field("intermediate_size", "mlp"), activation("hidden_act", GATED, "silu"))
LIKE_LLAMA = (*SIZES, *HEADS, *SWIGLU, EPSILON, ROPE)
RMS = {"norm": "rmsnorm", "bias": False}
QWEN_WINDOW = {"sliding_window": 4096, "use_sliding_window": False}


def _read_biases(values):
    attention = take_switch(values, "attention_bias")
    mlp = take_switch(values, "mlp_bias")
    if attention and mlp:
        return {"bias": True}
    return {"biased": "attention" if attention else "mlp" if mlp else "none"}


def _write_biases(model):
    return {
        "attention_bias": config.has_bias(model, "attention_out"),
        "mlp_bias": config.has_bias(model, "mlp"),
    }


LLAMA_BIASES = Key(("attention_bias", "mlp_bias"), _read_biases, _write_biases)
ATTENTION_BIAS = choice(
    "attention_bias", {False: {"biased": "none"}, True: {"biased": "attention"}}, False
)


# ---- keys of Gemma ----


def _read_scale(values):
    scalar = values.get("query_pre_attn_scalar") or 256
    head_dim = take(values, "head_dim", 256)
    return {"head_dim": head_dim, "attention_scale": 0.0 if scalar == head_dim else scalar**-0.5}


def _write_scale(model):
    """Their number is a whole one, so that not every scale can be said."""
    scalar = round(model.attention_scale**-2) if model.attention_scale else model.head_dim
    if model.attention_scale and not math.isclose(scalar**-0.5, model.attention_scale):
        raise UsageError(
            f"config.model.attention_scale = {model.attention_scale}: query_pre_attn_scalar is a "
            "whole number, and the scale is 1 / sqrt of it"
        )
    return {"head_dim": model.head_dim, "query_pre_attn_scalar": scalar}


GEMMA_SCALE = Key(("query_pre_attn_scalar", "head_dim"), _read_scale, _write_scale)
EMBED_SCALE = Key(
    (), lambda values: {"embed_scale": math.sqrt(take(values, "hidden_size"))}, lambda model: {}
)


def _cap(theirs: str, ours: str) -> Key:
    return Key(
        (theirs,),
        lambda values: {ours: values.get(theirs) or 0.0},
        lambda model: {theirs: getattr(model, ours) or None},
    )


GEMMA = (
    *SIZES,
    field("num_key_value_heads", "kv_heads", 0),
    GEMMA_SCALE,
    EMBED_SCALE,
    field("intermediate_size", "mlp"),
    activation("hidden_activation", {"gelu_pytorch_tanh": "geglu"}, "gelu_pytorch_tanh"),
    must("hidden_act", None, "gelu_pytorch_tanh"),
    EPSILON,
    TIED,
    ATTENTION_BIAS,
    LAYER_WINDOWS,
    _cap("final_logit_softcapping", "logit_softcap"),
    must("use_bidirectional_attention", False, None),
    must("cache_implementation", None, "hybrid"),
)
GEMMA_DEFAULTS = {"num_key_value_heads": 4, "sliding_window": 4096}
GEMMA_FIXED = {"norm": "unit_rmsnorm", "norm_position": "sandwich", "bias": False}

NEOX_ROPE = ROPE._replace(
    write=lambda model: {
        "rotary_emb_base": model.rope_base,
        "rotary_pct": model.rope_fraction,
        **(
            {}
            if model.rope_scale_factor == 1
            else {"rope_scaling": ROPE.write(model)["rope_scaling"]}
        ),
    }
)


def _read_inner(values):
    return {"mlp": values.get("n_inner") or 4 * take(values, "n_embd")}


GPT2_INNER = Key(("n_inner",), _read_inner, lambda model: {"n_inner": model.mlp})

# A family whose models are a special case of another's stands before it, because exporting takes
# the first that fits.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            {"norm": "layernorm", "position": "learned", "bias": True},
            (
                size("n_embd", "embed"),
                size("n_layer", "layers"),
                size("n_head", "heads"),
                size("n_positions", "max_seq"),
                size("vocab_size", "vocab"),
                GPT2_INNER,
                field("layer_norm_epsilon", "norm_epsilon", 1e-5),
                activation("activation_function", PLAIN, "gelu_new"),
                TIED,
                must("scale_attn_weights", True),
                must("scale_attn_by_inverse_layer_idx", False),
            ),
            GPT2_ROWS,
            base="transformer.",
            leftovers=(".attn.bias", ".attn.masked_bias"),
        ),
        Family(
            "nanogpt",
            "",
            {"norm": "layernorm", "position": "learned", "tied": True},
            (
                size("n_embd", "embed"),
                size("n_layer", "layers"),
                size("n_head", "heads"),
                size("block_size", "max_seq"),
                size("vocab_size", "vocab"),
                field("bias", "bias", True),
                Key(("dropout",), lambda values: {}, lambda model: {}),
            ),
            transpose_rows(GPT2_ROWS),
            base="transformer.",
            is_written=False,
        ),
        Family(
            "guide",
            "",
            {
                "norm": "layernorm",
                "norm_position": "post",
                "norm_epsilon": 1e-6,
                "final_norm": False,
                "position": "learned",
                "pattern": (("attention", "relu"),),
                "bias": True,
                "tied": False,
            },
            (*SIZES, field("head_dim", "head_dim"), field("intermediate_size", "mlp")),
            GUIDE_ROWS,
            base="",
            is_written=False,
        ),
        Family("llama", "LlamaForCausalLM", RMS, (*LIKE_LLAMA, UNTIED, LLAMA_BIASES), LLAMA_ROWS),
        Family(
            "mistral",
            "MistralForCausalLM",
            RMS,
            (*LIKE_LLAMA, UNTIED, ONE_WINDOW),
            LLAMA_ROWS,
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            RMS | {"biased": "qkv"},
            (*LIKE_LLAMA, UNTIED, SWITCHED_WINDOWS),
            LLAMA_ROWS,
            defaults=QWEN_WINDOW | {"num_key_value_heads": 32},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            RMS | {"qk_norm": True},
            (*LIKE_LLAMA, UNTIED, SWITCHED_WINDOWS, ATTENTION_BIAS),
            LLAMA_ROWS,
            defaults=QWEN_WINDOW | {"num_key_value_heads": 32, "head_dim": 128},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            GEMMA_FIXED,
            (*GEMMA, ROPE, _cap("attn_logit_softcapping", "attention_softcap")),
            (*TABLES, *ATTENTION, *MLP, *SANDWICH_NORMS),
            defaults=GEMMA_DEFAULTS
            | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            GEMMA_FIXED | {"qk_norm": True},
            # transformers keeps a cap of its scores in the config, and does not use it.
            (*GEMMA, TWO_ROPES, must("attn_logit_softcapping", None)),
            (*TABLES, *ATTENTION, *MLP, *SANDWICH_NORMS),
            defaults=GEMMA_DEFAULTS,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            RMS,
            (
                *SIZES,
                *HEADS,
                EPSILON,
                ROPE,
                UNTIED,
                ONE_WINDOW,
                MIXTRAL_WIDTH,
                choice("hidden_act", {"silu": {"expert_ffn": "swiglu"}}, "silu"),
                field("num_local_experts", "experts", 8),
                field("num_experts_per_tok", "experts_per_token", 2),
            ),
            (*TABLES, *ATTENTION, *PRE_NORMS, *MIXTRAL_EXPERTS),
            defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            RMS | {"qk_norm": True},
            (
                *SIZES,
                *HEADS,
                EPSILON,
                ROPE,
                UNTIED,
                SWITCHED_WINDOW,
                ATTENTION_BIAS,
                field("intermediate_size", "mlp"),
                field("moe_intermediate_size", "expert_mlp"),
                choice("hidden_act", {"silu": {"expert_ffn": "swiglu"}}, "silu"),
                field("num_experts_per_tok", "experts_per_token"),
                field("norm_topk_prob", "router_normalize", False),
                QWEN_LAYERS,
            ),
            (*LLAMA_ROWS, *QWEN_EXPERTS),
            defaults=QWEN_WINDOW | {"num_key_value_heads": 4},
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            RMS | {"norm_position": "branch", "qk_norm": True, "qk_norm_over": "all"},
            (*LIKE_LLAMA, UNTIED, ATTENTION_BIAS),
            (*TABLES, *ATTENTION, *MLP, *BRANCH_NORMS),
            defaults={"rms_norm_eps": 1e-5},
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {"norm": "layernorm", "bias": True},
            (
                *SIZES,
                field("intermediate_size", "mlp"),
                activation("hidden_act", PLAIN, "gelu"),
                field("layer_norm_eps", "norm_epsilon", 1e-5),
                field("use_parallel_residual", "parallel", True),
                NEOX_ROPE,
                UNTIED,
                must("attention_bias", True),
            ),
            NEOX_ROWS,
            base="gpt_neox.",
            leftovers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
            defaults={"rotary_pct": 0.25},
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            RMS,
            (
                *LIKE_LLAMA,
                UNTIED,
                ONE_WINDOW,
                must("attention_bias", False),
                Key(("original_max_position_embeddings",), lambda values: {}, lambda model: {}),
            ),
            PHI3_ROWS,
            defaults={"rms_norm_eps": 1e-5},
        ),
    )
}


def find_family(model_type: Any) -> Family:
    """The row of a `model_type`. Raises UsageError, with the known ones, for any other."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UsageError(
            f"config.json: model_type = {model_type!r} is not known; known: {', '.join(FAMILIES)}"
        )
    return family
