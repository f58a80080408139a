"""The tensors of a foreign directory: `model.safetensors`, whole or in shards with an index.

A tensor is read when it is asked for, into memory of its own. Nothing is mapped, so the memory of
reading a directory is that of one tensor. Layout of a file: 8 bytes with the length of a JSON
header, the header, and the tensors (https://github.com/huggingface/safetensors).
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """A tensor in a file: where its bytes are."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The values, in the dtype of the file. Raises UsageError if they cannot be read."""
        values = np.empty(self.shape, self.dtype)
        view = values.reshape(-1).view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise UsageError(f"{self.path}: ends inside a tensor; copy the file again")
                    view = view[count:]
        except OSError as error:
            raise UsageError(f"{self.path}: {describe_error(error)}") from None
        return values


def list_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory by name.

    Raises UsageError for a file that is missing, damaged or hostile, for a tensor that the index
    names and no file has, and for dtypes that are no floats.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / FILE).exists():
            raise UsageError(f"{directory}: has neither {FILE} nor {INDEX}")
        return read_header(directory / FILE)

    places = _read_index(index)
    files = sorted(set(places.values()))
    missing = [name for name in files if not (directory / name).exists()]
    if missing:
        raise UsageError(f"{index}: names files that are not there: {', '.join(missing)}")

    found: dict[str, Tensor] = {}
    for file in files:
        tensors = read_header(directory / file)
        absent = [name for name, place in places.items() if place == file and name not in tensors]
        if absent:
            raise UsageError(f"{directory / file}: has no {', '.join(absent)}, which {INDEX} names")
        found |= tensors
    return found


def _read_index(path: Path) -> Mapping[str, str]:
    """{tensor: file} of an index. Raises UsageError for another shape, or a path out of here."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        is_right = isinstance(places, dict) and all(isinstance(v, str) for v in places.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_right = False
    if not is_right:
        raise UsageError(f"{path}: is no index of tensors (an object weight_map of file names)")

    strange = [
        name
        for name in places.values()
        if os.path.basename(name) != name or name in ("", os.curdir, os.pardir)
    ]
    if strange:
        raise UsageError(f"{path}: {strange[0]!r} is no file name; it may not leave the directory")
    return places


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. The library checks the header first, so offsets can be trusted."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise UsageError(f"{path}: is damaged ({error}); copy the file again") from None
    except OSError as error:
        raise UsageError(f"{path}: {describe_error(error)}") from None

    tensors = {}
    strange = []
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES.get(facts["dtype"])
        if dtype is None:
            strange.append(f"{name} is {facts['dtype']}")
            continue
        start = 8 + length + facts["data_offsets"][0]
        tensors[name] = Tensor(path, start, tuple(facts["shape"]), dtype)
    if strange:
        raise UsageError(
            f"{path}: {', '.join(strange[:5])}; tensors must be one of {', '.join(DTYPES)}"
        )
    return tensors
