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
from gpt_jax.interop.keys import (
    GATED,
    LAYER_WINDOWS,
    ONE_WINDOW,
    PLAIN,
    ROPE,
    SWITCHED_WINDOW,
    SWITCHED_WINDOWS,
    TWO_ROPES,
    Key,
    activation,
    choice,
    count_layers,
    field,
    must,
    shorten,
    take,
    take_switch,
)
from gpt_jax.interop.rows import Row, row


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
    field("hidden_size", "embed"),
    field("num_hidden_layers", "layers"),
    field("num_attention_heads", "heads"),
    field("vocab_size", "vocab"),
    field("max_position_embeddings", "max_seq"),
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
    _cap("attn_logit_softcapping", "attention_softcap"),
    _cap("final_logit_softcapping", "logit_softcap"),
    must("use_bidirectional_attention", False, None),
    must("cache_implementation", None, "hybrid"),
)
GEMMA_DEFAULTS = {"num_key_value_heads": 4, "sliding_window": 4096}
GEMMA_FIXED = {"norm": "unit_rmsnorm", "norm_position": "sandwich", "bias": False}

# ---- keys of mixtures of experts ----


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

# ---- tensors ----

TABLES = (
    row("model.embed_tokens.weight", "embed/table"),
    row("model.norm.weight", "final_norm/scale"),
    row("lm_head.weight", "head/kernel", "transposed"),
)
LAYER = "model.layers.{layer}."
ATTENTION = (
    *(
        row(f"{LAYER}self_attn.{n}_proj.weight", f"attention/{n}/kernel", "transposed")
        for n in "qkv"
    ),
    *(row(f"{LAYER}self_attn.{n}_proj.bias", f"attention/{n}/bias") for n in "qkv"),
    row(f"{LAYER}self_attn.o_proj.weight", "attention/out/kernel", "transposed"),
    row(f"{LAYER}self_attn.o_proj.bias", "attention/out/bias"),
    row(f"{LAYER}self_attn.q_norm.weight", "attention/q_norm/scale"),
    row(f"{LAYER}self_attn.k_norm.weight", "attention/k_norm/scale"),
)
MLP = (
    *(row(f"{LAYER}mlp.{n}_proj.weight", f"mlp/{n}/kernel", "transposed") for n in ("gate", "up")),
    *(row(f"{LAYER}mlp.{n}_proj.bias", f"mlp/{n}/bias") for n in ("gate", "up")),
    row(f"{LAYER}mlp.down_proj.weight", "mlp/down/kernel", "transposed"),
    row(f"{LAYER}mlp.down_proj.bias", "mlp/down/bias"),
)
PRE_NORMS = (
    row(f"{LAYER}input_layernorm.weight", "mixer_norm/scale"),
    row(f"{LAYER}post_attention_layernorm.weight", "mlp_norm/scale"),
)
SANDWICH_NORMS = (
    row(f"{LAYER}input_layernorm.weight", "mixer_norm/scale"),
    row(f"{LAYER}post_attention_layernorm.weight", "mixer_out_norm/scale"),
    row(f"{LAYER}pre_feedforward_layernorm.weight", "mlp_norm/scale"),
    row(f"{LAYER}post_feedforward_layernorm.weight", "mlp_out_norm/scale"),
)
BRANCH_NORMS = (SANDWICH_NORMS[1], SANDWICH_NORMS[3])
LLAMA_ROWS = (*TABLES, *ATTENTION, *MLP, *PRE_NORMS)


def _experts(router: str, expert: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of a mixture of experts: its router, and the three matrices of each expert."""
    kernels = (
        row(f"{LAYER}{expert}.{theirs}.weight", f"mlp/experts/{ours}/kernel", "transposed")
        for ours, theirs in names.items()
    )
    return (row(f"{LAYER}{router}.weight", "mlp/router/kernel", "transposed"), *kernels)


MIXTRAL_EXPERTS = _experts(
    "block_sparse_moe.gate",
    "block_sparse_moe.experts.{expert}",
    {"gate": "w1", "up": "w3", "down": "w2"},
)
QWEN_EXPERTS = _experts(
    "mlp.gate",
    "mlp.experts.{expert}",
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
)

GPT2_LAYER = "transformer.h.{layer}."
GPT2_QKV = "attention/q/{0} attention/k/{0} attention/v/{0}"
GPT2_ROWS = (
    row("transformer.wte.weight", "embed/table"),
    row("transformer.wpe.weight", "position/table"),
    row(f"{GPT2_LAYER}attn.c_attn.weight", GPT2_QKV.format("kernel"), "columns"),
    row(f"{GPT2_LAYER}attn.c_attn.bias", GPT2_QKV.format("bias"), "columns"),
    row(f"{GPT2_LAYER}attn.c_proj.weight", "attention/out/kernel"),
    row(f"{GPT2_LAYER}attn.c_proj.bias", "attention/out/bias"),
    row(f"{GPT2_LAYER}mlp.c_fc.weight", "mlp/up/kernel"),
    row(f"{GPT2_LAYER}mlp.c_fc.bias", "mlp/up/bias"),
    row(f"{GPT2_LAYER}mlp.c_proj.weight", "mlp/down/kernel"),
    row(f"{GPT2_LAYER}mlp.c_proj.bias", "mlp/down/bias"),
    row(f"{GPT2_LAYER}ln_1.weight", "mixer_norm/scale"),
    row(f"{GPT2_LAYER}ln_1.bias", "mixer_norm/bias"),
    row(f"{GPT2_LAYER}ln_2.weight", "mlp_norm/scale"),
    row(f"{GPT2_LAYER}ln_2.bias", "mlp_norm/bias"),
    row("transformer.ln_f.weight", "final_norm/scale"),
    row("transformer.ln_f.bias", "final_norm/bias"),
    row("lm_head.weight", "head/kernel", "transposed"),
)


def _transpose(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of GPT-2 for files whose matrices are (out, in), as nanoGPT has them."""
    layouts = {"columns": "grouped", "same": "transposed"}

    def is_matrix(row):
        is_weight = row.theirs.startswith(GPT2_LAYER) and row.theirs.endswith("weight")
        return is_weight and ".ln_" not in row.theirs

    return tuple(
        one._replace(layout=layouts[one.layout]) if is_matrix(one) else one for one in rows
    )


NEOX_LAYER = "gpt_neox.layers.{layer}."
NEOX_ROWS = (
    row("gpt_neox.embed_in.weight", "embed/table"),
    row(f"{NEOX_LAYER}attention.query_key_value.weight", GPT2_QKV.format("kernel"), "heads"),
    row(f"{NEOX_LAYER}attention.query_key_value.bias", GPT2_QKV.format("bias"), "heads"),
    row(f"{NEOX_LAYER}attention.dense.weight", "attention/out/kernel", "transposed"),
    row(f"{NEOX_LAYER}attention.dense.bias", "attention/out/bias"),
    row(f"{NEOX_LAYER}mlp.dense_h_to_4h.weight", "mlp/up/kernel", "transposed"),
    row(f"{NEOX_LAYER}mlp.dense_h_to_4h.bias", "mlp/up/bias"),
    row(f"{NEOX_LAYER}mlp.dense_4h_to_h.weight", "mlp/down/kernel", "transposed"),
    row(f"{NEOX_LAYER}mlp.dense_4h_to_h.bias", "mlp/down/bias"),
    row(f"{NEOX_LAYER}input_layernorm.weight", "mixer_norm/scale"),
    row(f"{NEOX_LAYER}input_layernorm.bias", "mixer_norm/bias"),
    row(f"{NEOX_LAYER}post_attention_layernorm.weight", "mlp_norm/scale"),
    row(f"{NEOX_LAYER}post_attention_layernorm.bias", "mlp_norm/bias"),
    row("gpt_neox.final_layer_norm.weight", "final_norm/scale"),
    row("gpt_neox.final_layer_norm.bias", "final_norm/bias"),
    row("embed_out.weight", "head/kernel", "transposed"),
)
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

PHI3_ROWS = (
    *TABLES,
    row(f"{LAYER}self_attn.qkv_proj.weight", GPT2_QKV.format("kernel"), "grouped"),
    row(f"{LAYER}self_attn.o_proj.weight", "attention/out/kernel", "transposed"),
    row(f"{LAYER}mlp.gate_up_proj.weight", "mlp/gate/kernel mlp/up/kernel", "halves"),
    row(f"{LAYER}mlp.down_proj.weight", "mlp/down/kernel", "transposed"),
    *PRE_NORMS,
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
                field("n_embd", "embed"),
                field("n_layer", "layers"),
                field("n_head", "heads"),
                field("n_positions", "max_seq"),
                field("vocab_size", "vocab"),
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
                field("n_embd", "embed"),
                field("n_layer", "layers"),
                field("n_head", "heads"),
                field("block_size", "max_seq"),
                field("vocab_size", "vocab"),
                field("bias", "bias", True),
                Key(("dropout",), lambda values: {}, lambda model: {}),
            ),
            _transpose(GPT2_ROWS),
            base="transformer.",
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
            (*GEMMA, ROPE),
            (*TABLES, *ATTENTION, *MLP, *SANDWICH_NORMS),
            defaults=GEMMA_DEFAULTS
            | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            GEMMA_FIXED | {"qk_norm": True},
            (*GEMMA, TWO_ROPES),
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
