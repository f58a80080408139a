"""A model whose parameters are read slice by slice, wherever it comes from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import config as configs
from gpt_jax.data import TaskNote, Tokenizer
from gpt_jax.interop.weights import Slices


def name_entry(path: str, place: tuple[int, ...]) -> str:
    """A parameter, or its entry of a layer and of an expert.

    >>> name_entry("blocks/0/mlp/up/kernel", (3,))
    'blocks/0/mlp/up/kernel[3]'
    """
    return path + "".join(f"[{i}]" for i in place)


class Origin(NamedTuple):
    """A model that was opened, and nothing of its weights read yet.

    `read(path, index)` makes the part `index` of the parameter at `path`, in float32. `carried` are
    files that go with the model byte for byte, by name. `tokenizer` is None where there is none.
    `files` are those that it was read from, and `lineage()` are the places that it came through.
    `tasks` are those of the text that it was trained on, as a checkpoint notes them.
    `name_slice(path, place)` is what people call the entry `place` of a parameter: layer, expert.
    """

    name: str  # where it was found, for people
    model: configs.Model
    shapes: Mapping[str, tuple[int, ...]]  # of the parameters, by path
    read: Callable[[str, Slices], np.ndarray]
    tokenizer: Tokenizer | None
    carried: Mapping[str, bytes]
    family: str = ""  # that of the directory it was read from
    facts: Mapping[str, str | int] = MappingProxyType({})  # more of it for people
    files: tuple[Path, ...] = ()
    lineage: Callable[[], list[dict[str, Any]]] = list
    tasks: tuple[TaskNote, ...] = ()
    name_slice: Callable[[str, tuple[int, ...]], str] = name_entry
