"""A model that no family has is refused with the nearest one, and with all that differs."""

import json
from pathlib import Path

import numpy as np
import pytest
from goldens import FILE, GOLDENS, NAMES, refuse
from safetensors.numpy import load_file, save_file

from gpt_jax.errors import UsageError
from gpt_jax.interop import read_foreign_model
from gpt_jax.interop.nearest import NAMED


def change(directory: Path, kind: str, keys=(), add=(), drop="", reshape="") -> Path:
    """A directory of another `model_type`, with other keys and tensors in each layer."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | {"model_type": kind} | dict(keys)
    path.write_text(json.dumps(values))
    tensors = load_file(directory / FILE)
    for layer in range(values["num_hidden_layers"] or 0):
        for name in add:
            tensors[f"model.layers.{layer}.{name}"] = np.zeros(2, np.float32)
        tensors.pop(f"model.layers.{layer}.{drop}", None)
    if reshape:
        tensors[reshape] = np.zeros((3, 3), np.float32)
    save_file(tensors, directory / FILE)
    return directory


def test_keys_and_kinds_of_tensors_are_told_at_once(copy):
    directory = change(
        copy("llama3"),
        "cohere",
        {"logit_scale": 0.0625, "use_qk_norm": True},
        add=["self_attn.q_norm.weight", "self_attn.extra.weight"],
        drop="post_attention_layernorm.weight",
        reshape="model.norm.weight",
    )
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    assert refuse(directory)[1:] == [
        "nearest is llama, and these differ:",
        "  keys that are not understood: logit_scale = 0.0625, use_qk_norm = True",
        f"  tensors missing: model.layers.*.post_attention_layernorm.weight ({layers})",
        f"  tensors without a place in llama: model.layers.*.self_attn.extra.weight ({layers}), "
        f"model.layers.*.self_attn.q_norm.weight ({layers})",
        "  tensors of another shape: model.norm.weight (1)",
    ]
    with pytest.raises(UsageError, match="nearest is llama"):
        read_foreign_model(directory)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_the_nearest_to_itself(copy, name):
    """Under another name, each golden is nearest to a family that reads it without a fault."""
    directory = copy(name)
    values = json.loads((directory / "config.json").read_text())
    own = values["model_type"]
    (directory / "config.json").write_text(json.dumps(values | {"model_type": "unheard"}))
    lines = refuse(directory)
    assert "and nothing differs" in lines[1] or f"nearest is {own}, " in lines[1], lines


def test_a_model_without_a_layer_number(copy):
    """Its config makes no model of any family, and its faults are told."""
    directory = change(copy("llama3"), "cohere", {"num_hidden_layers": None})
    lines = refuse(directory)
    assert lines[1].startswith("nearest is ")
    assert any("num_hidden_layers is missing" in line for line in lines)


def test_a_known_family_tells_tensors_beside_keys(copy):
    directory = change(copy("llama3"), "llama", {"flux": 1}, add=["flux.weight"])
    key, tensors = refuse(directory)
    assert "flux = 1 is not understood" in key
    assert tensors.startswith("  tensors without a place in llama: model.layers.*.flux.weight (")


def test_a_tied_head_has_a_place(copy):
    directory = copy("llama_biases_tied")
    tensors = load_file(directory / FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / FILE)
    change(directory, "llama", {"flux": 1})
    assert len(refuse(directory)) == 1


def test_long_lists_are_cut_with_their_number(copy):
    keys = {f"k{i:02}": 1 for i in range(NAMED + 3)}
    line = refuse(change(copy("llama3"), "cohere", keys))[2]
    assert "k00 = 1, " in line and line.endswith("and 3 more") and f"k{NAMED}" not in line


def test_tensors_that_cannot_be_read_are_not_the_cause(copy):
    directory = copy("llama3")
    values = json.loads((GOLDENS / "llama3/config.json").read_text()) | {"model_type": "cohere"}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / FILE).unlink()
    [line] = refuse(directory)
    assert "'cohere' is not known" in line
