"""Older files and shorter configs mean what they mean in transformers."""

from pathlib import Path

import numpy as np
import pytest
from goldens import FILE, read_config
from safetensors.numpy import load_file, save_file

from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.foreign import open_foreign


def read_all(directory: Path) -> dict[str, np.ndarray]:
    origin = open_foreign(directory)
    return {
        path: origin.read(path, tuple(map(slice, shape))) for path, shape in origin.shapes.items()
    }


def test_an_old_gpt2_file_opens(copy):
    """Files of 2019 have no prefix, and hold masks of attention."""
    directory = copy("gpt2")
    wanted = read_all(directory)
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(directory / FILE).items()
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones([1, 1, 64, 64], np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, directory / FILE)

    for path, values in read_all(directory).items():
        np.testing.assert_array_equal(values, wanted[path])


OLD_ROPES = {
    "llama3": lambda rope: dict(
        rope_theta=rope["rope_theta"],
        rope_scaling={key: value for key, value in rope.items() if key != "rope_theta"},
    ),
    "llama_linear": lambda rope: dict(
        rope_theta=rope["rope_theta"], rope_scaling=dict(type="linear", factor=rope["factor"])
    ),
    "gemma3_linear": lambda rope: dict(
        rope_theta=rope["full_attention"]["rope_theta"],
        rope_local_base_freq=rope["sliding_attention"]["rope_theta"],
        rope_scaling=dict(rope_type="linear", factor=rope["full_attention"]["factor"]),
    ),
    "gpt_neox": lambda rope: dict(
        rotary_emb_base=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"]
    ),
    "phi3_partial": lambda rope: dict(
        rope_theta=rope["rope_theta"], partial_rotary_factor=rope["partial_rotary_factor"]
    ),
}


@pytest.mark.parametrize("name", OLD_ROPES)
def test_old_keys_of_rotary_positions_mean_the_same(name):
    values = read_config(name)
    rope = values.pop("rope_parameters")
    assert read_model(values | OLD_ROPES[name](rope)) == read_model(
        values | {"rope_parameters": rope}
    )


@pytest.mark.parametrize(
    "name, pattern", [("gemma2", {}), ("gemma3", {"sliding_window_pattern": 3})]
)
def test_windows_without_a_list_of_layers_mean_the_same(name, pattern):
    values = read_config(name)
    kinds = values.pop("layer_types")
    values.pop("_sliding_window_pattern", None)
    assert read_model(values | pattern) == read_model(values | {"layer_types": kinds})


ABSENT = [
    ("mistral", "sliding_window", "windows", (4096,)),
    ("mixtral_shards", "rms_norm_eps", "norm_epsilon", 1e-5),
    ("qwen2_windows_tied", "use_sliding_window", "windows", (0,)),
    ("qwen3", "head_dim", "head_dim", 128),
    ("gemma2", "attn_logit_softcapping", "attention_softcap", 50.0),
    ("qwen3_moe", "norm_topk_prob", "router_normalize", False),
    ("gpt_neox", "rope_parameters", "rope_fraction", 0.25),
]


@pytest.mark.parametrize("name, key, field, meant", ABSENT)
def test_an_absent_key_means_what_transformers_takes(name, key, field, meant):
    """Files may leave out what is the default of their family (test_live_families.py has all)."""
    values = read_config(name)
    del values[key]
    assert getattr(read_model(values), field) == meant
