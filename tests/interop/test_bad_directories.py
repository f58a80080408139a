"""A directory of a foreign model that cannot be used is refused with lines, never a traceback.

Each case changes one directory that opens. Old spellings of what means the same still open.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt_jax.errors import UsageError
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.families import FAMILIES
from gpt_jax.interop.foreign import open_foreign

GOLDENS = Path(__file__).parent / "goldens"
DEEP = b"[" * 100_000  # more than a parser that calls itself can open
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    """A function that copies a golden and returns its new directory."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return make


def read_config(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())


def change_config(directory: Path, **changes) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def refuse(directory: Path) -> list[str]:
    """The lines with which a directory is refused."""
    with pytest.raises(UsageError) as error:
        open_foreign(directory)
    assert all(isinstance(line, str) and "\n" not in line for line in error.value.args)
    return list(error.value.args)


# ---- config.json ----


def test_a_directory_without_a_config(copy):
    directory = copy("llama3")
    (directory / "config.json").unlink()
    [line] = refuse(directory)
    assert "config.json: " in line and "a model's directory has one" in line


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"null", b'"llama"', DEEP])
def test_a_config_that_is_no_object(copy, content):
    directory = copy("llama3")
    (directory / "config.json").write_bytes(content)
    [line] = refuse(directory)
    assert "is no JSON" in line


@pytest.mark.parametrize("kind", ["bert", None, 3, [], {}])
def test_an_unknown_family_lists_the_known_ones(copy, kind):
    [line] = refuse(change_config(copy("llama3"), model_type=kind))
    assert f"model_type = {kind!r} is not known" in line
    assert all(name in line for name in FAMILIES)


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
    "no layers": ("llama3", dict(num_hidden_layers=0), "config.model.layers = 0"),
    "below zero": ("llama3", dict(hidden_size=-16), "config.model.embed = -16"),
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


# ---- tensors ----


def test_no_tensors_at_all(copy):
    directory = copy("llama3")
    (directory / FILE).unlink()
    [line] = refuse(directory)
    assert f"has neither {FILE} nor {INDEX}" in line


def test_a_shard_that_is_absent(copy):
    directory = copy("mixtral_shards")
    first, second, *_ = sorted(directory.glob("*.safetensors"))
    first.unlink()
    second.unlink()
    [line] = refuse(directory)
    assert first.name in line and second.name in line


@pytest.mark.parametrize("place", ["../x", "/etc/passwd", "a/b.safetensors", "", ".", ".."])
def test_an_index_may_not_leave_the_directory(copy, place):
    directory = copy("mixtral_shards")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = place
    (directory / INDEX).write_text(json.dumps(index))
    [line] = refuse(directory)
    assert "is no file name; it may not leave the directory" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        DEEP,
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
    ],
)
def test_an_index_of_another_shape(copy, content):
    directory = copy("mixtral_shards")
    (directory / INDEX).write_bytes(content)
    [line] = refuse(directory)
    assert "is no index of tensors" in line


def test_a_tensor_that_the_index_names_and_no_file_has(copy):
    directory = copy("mixtral_shards")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.absent"] = index["weight_map"]["lm_head.weight"]
    (directory / INDEX).write_text(json.dumps(index))
    [line] = refuse(directory)
    assert "has no model.absent" in line


def write_header(path: Path, header, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, end: int, shape, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "a length beyond the file": (b"{}", b"", 2**40),
    "a length beyond memory": (b"{}", b"", 2**63 + 5),
    "no JSON": (b"{{{{{{{{", b"", None),
    "no object": (b"[1, 2]  ", b"", None),
    "another kind of entry": ({"a": 3}, b"", None),
    "offsets beyond the file": ({"a": entry(0, 4000, [1000])}, b"1234", None),
    "offsets that overlap": ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", None),
    "offsets that run backwards": ({"a": entry(4, 0, [1])}, b"1234", None),
    "offsets below the start": ({"a": entry(-4, 0, [1])}, b"1234", None),
    "a hole": ({"a": entry(4, 8, [1])}, b"12345678", None),
    "a shape of another size": ({"a": entry(0, 4, [2])}, b"1234", None),
    "a shape that overflows": ({"a": entry(0, 4, [2**62, 2**62, 5])}, b"1234", None),
    "a shape below zero": ({"a": entry(0, 4, [-1])}, b"1234", None),
    "an unknown dtype": ({"a": entry(0, 4, [1], "F31")}, b"1234", None),
    "surplus bytes": ({"a": entry(0, 4, [1])}, b"12345678", None),
    "deep JSON": (DEEP, b"", None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header(copy, case):
    directory = copy("llama3")
    write_header(directory / FILE, *HOSTILE[case])
    [line] = refuse(directory)
    assert FILE in line and "is damaged" in line


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500, -1])
def test_a_truncated_file(copy, size):
    directory = copy("llama3")
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(content[:size])
    [line] = refuse(directory)
    assert FILE in line and "copy the file again" in line


def test_flipped_bits_of_the_header_never_raise_anything_else(copy):
    """A flipped bit of the header is refused, or changed nothing that is read."""
    directory = copy("llama3")
    content = (directory / FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*range(8), *rng.integers(8, 8 + length, 150)]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        (directory / FILE).write_bytes(changed)
        try:
            open_foreign(directory)
        except UsageError:
            refused += 1
    assert refused > 100


def test_a_file_that_shrinks_after_it_was_opened(copy):
    directory = copy("llama3")
    origin = open_foreign(directory)
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(content[: len(content) // 4])
    with pytest.raises(UsageError, match="ends inside a tensor; copy the file again"):
        for path, shape in origin.shapes.items():
            origin.read(path, tuple(map(slice, shape)))


def test_tensors_that_are_no_floats(copy):
    directory = copy("llama3")
    tensors = load_file(directory / FILE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_file(tensors, directory / FILE)
    [line] = refuse(directory)
    assert "lm_head.weight is I8; tensors must be one of F64, F32, F16, BF16" in line


def test_missing_surplus_and_misshapen_tensors_are_listed_at_once(copy):
    directory = copy("llama3")
    tensors = load_file(directory / FILE)
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = np.zeros([3], np.float32)
    tensors["lm_head.weight"] = np.zeros([48, 17], np.float32)
    save_file(tensors, directory / FILE)
    missing, misshapen, surplus = sorted(
        refuse(directory), key=lambda line: ("has no place" in line, "is needed" in line)
    )
    assert "model.norm.weight [16] is missing" in missing
    assert "lm_head.weight is [48, 17], and [48, 16] is needed" in misshapen
    assert "model.extra.weight [3] has no place in llama" in surplus


# ---- older files that mean the same ----


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
