"""A config of a foreign model that cannot be used is refused with lines, never a traceback.

Each case changes one directory that opens.
"""

import json
from pathlib import Path

import pytest
from goldens import DEEP, GOLDENS, read_config, refuse

from gpt_jax.errors import UsageError
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.families import FAMILIES
from gpt_jax.interop.foreign import is_foreign, open_foreign


def change_config(directory: Path, **changes) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_a_directory_without_a_config(copy):
    directory = copy("llama3")
    (directory / "config.json").unlink()
    [line] = refuse(directory)
    assert "config.json: " in line and "a model's directory has one" in line


def test_a_folder_of_exports_is_several_models(copy, tmp_path):
    folder = tmp_path / "exports"
    folder.mkdir()
    for step in ("20", "100"):
        copy("llama3").rename(folder / step)
    with pytest.raises(UsageError, match=f"several steps; name one, such as {folder}/100"):
        is_foreign(folder)
    assert is_foreign(folder / "20") and not is_foreign(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"null", b'"llama"', DEEP])
def test_a_config_that_is_no_object(copy, content):
    directory = copy("llama3")
    (directory / "config.json").write_bytes(content)
    [line] = refuse(directory)
    assert "is no JSON" in line


@pytest.mark.parametrize("kind", ["bert", None, 3, [], {}])
def test_an_unknown_family_lists_the_known_ones(copy, kind):
    line, nearest = refuse(change_config(copy("llama3"), model_type=kind))
    assert f"model_type = {kind!r} is not known" in line
    assert all(name in line for name in FAMILIES)
    assert "nearest is llama, and nothing differs; " in nearest and "'llama'" in nearest


def test_an_unknown_key_is_named_with_the_way_out(copy):
    directory = change_config(copy("llama3"), flux=3)
    [line] = refuse(directory)
    assert "flux = 3" in line and "--ignore_keys=flux" in line
    assert open_foreign(directory, ("flux",)).model == open_foreign(GOLDENS / "llama3").model


def test_an_unknown_key_without_a_value_is_fine(copy):
    open_foreign(change_config(copy("llama3"), flux=None))


UNSUPPORTED = {
    "activation": ("llama3", dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
    "rope": (
        "llama3",
        dict(rope_parameters=dict(rope_type="yarn", factor=2.0)),
        "'yarn' is not supported; known: default, linear, llama3",
    ),
    "scaling by layer": (
        "gpt2",
        dict(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx = True is not supported",
    ),
    "both directions": (
        "gemma3",
        dict(use_bidirectional_attention=True),
        "use_bidirectional_attention = True is not supported",
    ),
    "kind of a layer": (
        "gemma3",
        dict(layer_types=["full_attention", "linear_attention", "full_attention"]),
        "layer_types has linear_attention; known: full_attention, sliding_attention",
    ),
    "too few kinds": ("gemma3", dict(layer_types=["full_attention"]), "1 entries for 3 layers"),
    "heads": ("llama3", dict(num_key_value_heads=3), "config.model.kv_heads = 3: must divide"),
    "no layers": ("llama3", dict(num_hidden_layers=0), "num_hidden_layers = 0 is no whole number"),
    "below zero": ("llama3", dict(hidden_size=-16), "hidden_size = -16 is no whole number"),
    "no size": ("llama3", dict(vocab_size=None), "vocab_size is missing"),
    "every 0th layer": ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step = 0"),
    "a word for a switch": (
        "qwen2_windows_tied",
        dict(use_sliding_window="no"),
        "use_sliding_window = 'no' is neither true nor false",
    ),
    "more layers than fit": (
        "gemma3",
        dict(num_hidden_layers=10**12),
        "num_hidden_layers = 1000000000000; expected 1 to 10,000",
    ),
    "two scalings": (
        "llama3",
        dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
        "has rope_parameters and rope_scaling",
    ),
    "scaling of layers with a window": (
        "gemma3",
        dict(
            rope_parameters=dict(
                full_attention=dict(rope_theta=1e6),
                sliding_attention=dict(rope_theta=1e4, rope_type="linear", factor=2.0),
            )
        ),
        "layers with a window have scaled frequencies",
    ),
    "more experts than there are": (
        "mixtral_shards",
        dict(num_experts_per_tok=9),
        "config.model.experts_per_token = 9: is more than config.model.experts = 4",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_value_that_is_not_supported(copy, case):
    name, changes, text = UNSUPPORTED[case]
    assert text in "\n".join(refuse(change_config(copy(name), **changes)))


STRANGE = [
    "many",
    -1,
    0,
    1e30,
    10**12,
    float("nan"),
    float("inf"),
    [],
    {},
    [1],
    {"a": 1},
    True,
    "7",
    [[]],
]


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3", "qwen2_windows_tied", "gemma3", "qwen3_moe", "gpt_neox"]
)
def test_no_value_of_another_type_raises_anything_else(name):
    """Every key of the family gets every strange value: it means something or is refused."""
    values = read_config(name)
    refused = 0
    keys = {key for fact in FAMILIES[values["model_type"]].keys for key in fact.names}
    for key in sorted(keys):
        for strange in STRANGE:
            try:
                read_model(values | {key: strange})
            except UsageError as error:
                refused += 1
                assert all(isinstance(line, str) for line in error.args)
    assert refused > 5 * len(keys)


@pytest.mark.parametrize(
    "name, key",
    [
        ("llama3", "hidden_size"),
        ("llama3", "rms_norm_eps"),
        ("llama3", "rope_parameters"),
        ("llama3", "tie_word_embeddings"),
        ("mistral", "sliding_window"),
        ("gemma3", "layer_types"),
        ("gemma3", "query_pre_attn_scalar"),
        ("qwen3_moe", "mlp_only_layers"),
    ],
)
def test_a_value_of_another_type_is_named(copy, name, key):
    text = "\n".join(refuse(change_config(copy(name), **{key: "many"})))
    ours = {
        field for fact in FAMILIES[read_config(name)["model_type"]].keys for field in fact.names
    }
    assert key in ours and (key in text or "config.model." in text)


def test_several_faults_are_told_at_once(copy):
    directory = change_config(copy("llama3"), flux=3, hidden_act="gelu", vocab_size=None)
    lines = refuse(directory)
    assert len(lines) == 3
    assert all(any(key in line for line in lines) for key in ("flux", "hidden_act", "vocab_size"))
