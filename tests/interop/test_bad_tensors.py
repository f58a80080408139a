"""Files of tensors that are damaged, hostile or of another model are refused with lines."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from goldens import DEEP, FILE, INDEX, refuse
from safetensors.numpy import load_file, save_file

from gpt_jax.errors import UsageError
from gpt_jax.interop.foreign import open_foreign


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
