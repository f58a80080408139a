"""Tensors of a `torch.save` file, read without torch, and without running what the file says.

Such a file is a zip with `data.pkl`, a pickle, and `data/0`, `data/1`, …, the raw storages. A
pickle may name any function of any module. Here only those that make tensors are known, and all
others are refused by name.
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
}


class Storage(NamedTuple):
    """A storage of the file: an entry of the zip, and how many values it has."""

    file: Path
    entry: str
    dtype: np.dtype
    count: int


class TorchTensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values

    def read(self) -> np.ndarray:
        """The values. Raises UsageError if the file has fewer than it says."""
        dtype = self.storage.dtype
        try:
            with zipfile.ZipFile(self.storage.file) as archive:
                values = np.frombuffer(archive.read(self.storage.entry), dtype)
        except Exception as error:  # a damaged zip may end in any error
            raise UsageError(f"{self.storage.file}: {self.storage.entry}: {error}") from None
        if len(values) < self.storage.count:
            raise UsageError(f"{self.storage.file}: {self.storage.entry} is cut short")
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, strides, writeable=False
        )


def _rebuild_tensor(storage, offset, shape, strides, *rest) -> TorchTensor:
    """What torch._utils._rebuild_tensor_v2 makes. It checks that no entry lies outside."""
    parts = (offset, *shape, *strides)
    is_sound = (
        isinstance(storage, Storage)
        and len(shape) == len(strides)
        and all(isinstance(part, int) and part >= 0 for part in parts)
    )
    if not is_sound:
        raise pickle.UnpicklingError("a tensor with a shape that cannot be")
    last = offset + sum(
        max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True)
    )
    if math.prod(shape) and last >= storage.count:
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch.nn.parameter", "Parameter"): lambda tensor, *rest: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    """An unpickler that knows KNOWN alone."""

    def __init__(self, stream, file: Path, folder: str):
        super().__init__(stream, encoding="utf-8")
        self._file = file
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        found = KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return Storage(self._file, f"{self._folder}/data/{key}", dtype, count)


def read_torch_file(path: Path) -> Mapping[str, Any]:
    """The dict that was saved, with a TorchTensor for each tensor.

    Raises UsageError for a file of another kind, and for one that would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
            if name is None:
                raise UsageError(f"{path}: is no file of torch.save: it has no data.pkl")
            with archive.open(name) as stream:
                saved = _Reader(stream, path, name.removesuffix("/data.pkl")).load()
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {describe_error(error)}") from None
    except Exception as error:  # a pickle may end in any error
        raise UsageError(f"{path}: is no file of tensors alone: {error}") from None
    if not isinstance(saved, Mapping):
        raise UsageError(f"{path}: holds a {type(saved).__name__}, and a dict is needed")
    return saved
