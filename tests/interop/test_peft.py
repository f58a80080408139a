"""Adapters as a directory of peft: its documented layout, and peft's own model."""

import json
from dataclasses import replace

import drawn_models
import numpy as np
import pytest
from small_configs import refuses

from gpt_jax import config as configs
from gpt_jax.interop import list_shapes
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.peft import write_peft
from gpt_jax.model.parameters import describe_parameter

LORA = configs.Lora(rank=2, alpha=8.0, dropout=0.1, variant="dora")
LLAMA = drawn_models.LLAMA | dict(vocab=32, max_seq=16, windows=(0,))


def make_origin(**fields) -> Origin:
    model = configs.resolve(configs.Config(model=configs.Model(**fields))).model
    shapes = list_shapes(model)
    rng = np.random.default_rng(0)
    arrays = {path: np.float32(0.3 * rng.standard_normal(x)) for path, x in shapes.items()}
    return Origin("a model", model, shapes, lambda path, index: arrays[path][index], None, {})


def draw_adapters(origin: Origin, lora: configs.Lora, words: str = "kernel"):
    rng = np.random.default_rng(1)
    adapters = {}
    for path, shape in origin.shapes.items():
        if describe_parameter(path).role != "matrix" or words not in path:
            continue
        *lead, width, features = shape
        adapters[path] = {
            "a": np.float32(rng.standard_normal((*lead, width, lora.rank))),
            "b": np.float32(rng.standard_normal((*lead, lora.rank, features))),
        }
        if lora.variant == "dora":
            adapters[path]["m"] = np.float32(rng.random((*lead, features)) + 0.5)
    return adapters


def test_the_layout_is_that_of_peft(tmp_path):
    """Keys, shapes and settings, as peft's page "Checkpoint format" lists them."""
    from safetensors.numpy import load_file

    origin = make_origin(**LLAMA)
    adapters = draw_adapters(origin, LORA)
    write_peft(origin, LORA, adapters, "somewhere", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert len(tensors) == 3 * 7 * 3
    place = "base_model.model.model.layers.2.self_attn.k_proj."
    parts = adapters["blocks/0/attention/k/kernel"]
    np.testing.assert_array_equal(tensors[f"{place}lora_A.weight"], parts["a"][2].T)
    np.testing.assert_array_equal(tensors[f"{place}lora_B.weight"], parts["b"][2].T)
    np.testing.assert_array_equal(tensors[f"{place}lora_magnitude_vector"], parts["m"][2])
    assert tensors[f"{place}lora_A.weight"].shape == (2, 16)

    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings.pop("target_modules")[-1] == "model.layers.2.mlp.down_proj"
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "r": 2,
        "use_dora": True,
        "use_rslora": False,
    }
    refuses(lambda: write_peft(origin, LORA, adapters, "", tmp_path / "peft"), "is there already")


def test_tensors_that_hold_several_matrices_are_refused(tmp_path):
    """GPT-2 joins q, k and v. Its feed-forward lies as (in, out)."""
    lora = replace(LORA, variant="lora")
    origin = make_origin(
        layers=2, embed=16, heads=2, vocab=32, max_seq=16, pattern=(("attention", "gelu_tanh"),)
    )
    adapters = draw_adapters(origin, lora)
    words = ("transformer.h.0.attn.c_attn.weight", "3 matrices", "--format=hf")
    refuses(lambda: write_peft(origin, lora, adapters, "", tmp_path / "all"), *words)
    write_peft(origin, lora, draw_adapters(origin, lora, "mlp"), "", tmp_path / "mlp")
    settings = json.loads((tmp_path / "mlp/adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] and not settings["use_dora"]
    assert settings["target_modules"][0] == "transformer.h.0.mlp.c_fc"


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_peft_computes_the_merged_model(tmp_path, variant):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    from gpt_jax.interop import write_directory
    from gpt_jax.run.adapters import read_merged

    lora = replace(LORA, variant=variant)
    origin = make_origin(**LLAMA)
    adapters = draw_adapters(origin, lora)
    write_directory(origin, tmp_path / "base")
    write_directory(origin._replace(read=read_merged(origin, adapters, lora)), tmp_path / "merged")
    write_peft(origin, lora, adapters, str(tmp_path / "base"), tmp_path / "peft")

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)

    ids = torch.arange(16)[None] % 32
    with torch.no_grad():
        ours = load("merged")(ids).logits
        theirs = peft.PeftModel.from_pretrained(load("base"), tmp_path / "peft")(ids).logits
        plain = load("base")(ids).logits
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(plain - ours)).max() > 0.1
