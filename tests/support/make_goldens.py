"""Tiny random models of other projects' families, with what transformers computes from them.

    python tests/support/make_goldens.py tests/interop/goldens [NAME …]

Run it with a Python that has `torch` and `transformers`. Each model gets a directory with
`config.json` and its tensors, as `save_pretrained` writes them, and a `golden.npz`:

- `ids` [B, T] and their `logits` [B, T, V] in float32
- `grad/NAME` for each tensor of the file: the gradient of the mean next-token cross-entropy
- `prompt` and `greedy`, the GREEDY tokens that follow it

`make_live` makes a model without writing it (tests/interop/test_live_families.py).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

VOCAB, BATCH, LENGTH, PROMPT, GREEDY, VARIETY = 48, 2, 18, 6, 50, 5
# A greedy text is kept if it has VARIETY different tokens, and if its best two logits are never
# closer than this part of the largest one.
# Two programs round differently, and would take different tokens from a tie.
CLEAR = 1e-3

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=64)
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
NEOX |= dict(num_attention_heads=2)
HEAD6 = dict(head_dim=6)
ROPE = dict(rope_theta=200.0, rope_type="default")
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=200.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=500.0, factor=3.0)
LOCAL, FULL = "sliding_attention", "full_attention"
GEMMA = SIZES | HEAD6 | dict(query_pre_attn_scalar=9, sliding_window=5, num_hidden_layers=3)
GEMMA |= dict(intermediate_size=16)
GEMMA3 = GEMMA | dict(layer_types=[LOCAL, LOCAL, FULL])
MOE = dict(num_experts_per_tok=2)
WINDOW = dict(use_sliding_window=True, sliding_window=5)

# The name of a golden, its class of config, and that config.
VARIANTS = {
    "gpt2": ("GPT2Config", GPT2 | dict(bos_token_id=None, eos_token_id=None)),
    "llama3": ("LlamaConfig", SIZES | dict(head_dim=8, rope_parameters=LLAMA3_ROPE)),
    "llama_linear": ("LlamaConfig", SIZES | dict(rope_parameters=LINEAR)),
    "llama_biases_tied": (
        "LlamaConfig",
        SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama_attention_bias": ("LlamaConfig", SIZES | dict(attention_bias=True)),
    "llama_mlp_bias": ("LlamaConfig", SIZES | dict(mlp_bias=True)),
    "mistral": ("MistralConfig", SIZES | HEAD6 | dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2_windows_tied": (
        "Qwen2Config",
        SIZES | WINDOW | dict(max_window_layers=1, num_hidden_layers=3, tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3Config", SIZES | HEAD6 | dict(rope_parameters=ROPE)),
    "gemma2": (
        "Gemma2Config",
        GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA3),
    "gemma3_linear": (
        "Gemma3TextConfig",
        GEMMA3 | dict(rope_parameters={FULL: LINEAR, LOCAL: ROPE | dict(rope_theta=50.0)}),
    ),
    "mixtral_shards": (
        "MixtralConfig",
        SIZES | MOE | dict(intermediate_size=8, num_local_experts=4),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES
        | HEAD6
        | MOE
        | WINDOW
        | dict(moe_intermediate_size=8, num_experts=4, mlp_only_layers=[0], norm_topk_prob=False),
    ),
    "olmo2": ("Olmo2Config", SIZES),
    "gpt_neox": ("GPTNeoXConfig", NEOX | dict(rotary_pct=0.5)),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        NEOX | dict(use_parallel_residual=False, rotary_pct=1.0),
    ),
    "phi3": ("Phi3Config", SIZES | dict(sliding_window=5)),
    "phi3_partial": (
        "Phi3Config",
        SIZES | dict(rope_parameters=dict(ROPE, partial_rotary_factor=0.5)),
    ),
}
# Where a golden is not one file.
SHARD_SIZES = {"mixtral_shards": "12KB"}


def make_live(name: str, seed: int):
    """The model of a variant, with random weights from `seed`.

    No vector is left at its start, because scales of one and biases of zero could be mixed up.
    """
    kind, settings = VARIANTS[name]
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model


def draw_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def compute_logits(model, ids: np.ndarray) -> torch.Tensor:
    """The logits [B, T, V] of ids [B, T]."""
    return model(input_ids=torch.tensor(ids), use_cache=False).logits


def compute_gradients(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients by the names in the file.

    They take the place of the parameters, because saving the model then gives them those names.
    """
    logits = compute_logits(model, ids)[:, :-1]
    targets = torch.tensor(ids)[:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
        model.save_pretrained(folder)
        gradients = load_file(Path(folder) / "model.safetensors")
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    return gradients


def continue_greedily(model) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, the GREEDY tokens after it), of the first prompt whose text is clear and varied."""
    model.generation_config.eos_token_id = None
    for seed in range(1000):
        prompt = draw_ids(seed, PROMPT)
        done = model.generate(
            torch.tensor(prompt[None]),
            max_new_tokens=GREEDY,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(done.logits)
        best = logits.topk(2).values
        tokens = done.sequences[0, PROMPT:].numpy()
        is_clear = (best[:, 0] - best[:, 1]).min() > CLEAR * logits.abs().max()
        if is_clear and len(set(tokens.tolist())) >= VARIETY:
            return prompt, tokens
    raise RuntimeError("no prompt has a clear and varied text")


def write_golden(name: str, folder: Path) -> None:
    """Writes the directory of one variant."""
    model = make_live(name, seed=list(VARIANTS).index(name))
    ids = draw_ids(1, BATCH, LENGTH)
    with torch.no_grad():
        logits = compute_logits(model, ids).numpy()
    prompt, greedy = continue_greedily(model)

    model.save_pretrained(folder, max_shard_size=SHARD_SIZES.get(name, "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    gradients = {f"grad/{key}": value for key, value in compute_gradients(model, ids).items()}
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids.astype(np.int32),
        logits=logits.astype(np.float32),
        prompt=prompt.astype(np.int32),
        greedy=greedy.astype(np.int32),
        **gradients,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size:,} bytes, {len(set(greedy.tolist()))} tokens in its text")


def main() -> None:
    target = Path(sys.argv[1])
    for name in sys.argv[2:] or VARIANTS:
        write_golden(name, target / name)


if __name__ == "__main__":
    main()
