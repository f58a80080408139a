"""The tensors of the families by name, and which parameters of ours they hold.

Names are those of Hugging Face `transformers`. Shapes of what has a layout of its own stand in
rows.py.
"""

from collections.abc import Mapping

from gpt_jax.interop.rows import Row, row

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


def make_expert_rows(router: str, expert: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of a mixture of experts: its router, and the three matrices of each expert."""
    kernels = (
        row(f"{LAYER}{expert}.{theirs}.weight", f"mlp/experts/{ours}/kernel", "transposed")
        for ours, theirs in names.items()
    )
    return (row(f"{LAYER}{router}.weight", "mlp/router/kernel", "transposed"), *kernels)


MIXTRAL_EXPERTS = make_expert_rows(
    "block_sparse_moe.gate",
    "block_sparse_moe.experts.{expert}",
    {"gate": "w1", "up": "w3", "down": "w2"},
)
QWEN_EXPERTS = make_expert_rows(
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


def transpose_rows(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of GPT-2 for files whose matrices are (out, in), as nanoGPT has them."""
    layouts = {"columns": "grouped", "same": "transposed"}

    def is_matrix(row):
        is_weight = row.theirs.startswith(GPT2_LAYER) and row.theirs.endswith("weight")
        return is_weight and ".ln_" not in row.theirs

    return tuple(
        one._replace(layout=layouts[one.layout]) if is_matrix(one) else one for one in rows
    )


# Names that keras_file.py gives: 0 is the kernel or the scale, and 1 is the bias.
GUIDE_LAYER = "blocks.{layer}."
GUIDE_PARTS = {
    **{n: f"attention/{n}/kernel attention/{n}/bias" for n in ("q", "k", "v", "out")},
    **{n: f"mlp/{n}/kernel mlp/{n}/bias" for n in ("up", "down")},
    "norm1": "mixer_norm/scale mixer_norm/bias",
    "norm2": "mlp_norm/scale mlp_norm/bias",
}
GUIDE_ROWS = (
    row("tokens.0", "embed/table"),
    row("positions.0", "position/table"),
    *(
        row(f"{GUIDE_LAYER}{part}.{number}", path)
        for part, paths in GUIDE_PARTS.items()
        for number, path in enumerate(paths.split())
    ),
    row("head.0", "head/kernel"),
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
PHI3_ROWS = (
    *TABLES,
    row(f"{LAYER}self_attn.qkv_proj.weight", GPT2_QKV.format("kernel"), "grouped"),
    row(f"{LAYER}self_attn.o_proj.weight", "attention/out/kernel", "transposed"),
    row(f"{LAYER}mlp.gate_up_proj.weight", "mlp/gate/kernel mlp/up/kernel", "halves"),
    row(f"{LAYER}mlp.down_proj.weight", "mlp/down/kernel", "transposed"),
    *PRE_NORMS,
)
