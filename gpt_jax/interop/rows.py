"""How the tensors of other projects become our parameters, and back: rows and their layouts.

Shapes: D embed, F mlp, N heads, K kv heads, H head_dim, V vocab.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import config


class Row(NamedTuple):
    """One kind of foreign tensor.

    `theirs` is its name, in which {layer} and {expert} stand for numbers. `ours` are the paths of
    the parameters it holds: within a layer where the name has {layer}, and whole paths elsewhere.
    `layout` names a row of LAYOUTS.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "same"


class Tensors(NamedTuple):
    """How one foreign tensor is cut into our arrays, and how these are joined into it."""

    split: Callable[[np.ndarray, config.Model], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], config.Model], np.ndarray]


def row(theirs: str, ours: str, layout: str = "same") -> Row:
    """A row whose paths stand in one text with spaces between."""
    return Row(theirs, tuple(ours.split()), layout)


def _transpose_one(x, model):
    return [x.T]


def _keep_one(x, model):
    return [x]


def _split_columns(x, model):
    return np.split(x, 3, axis=-1)


def _join_columns(parts, model):
    return np.concatenate(parts, axis=-1)


def _split_heads(x, model):
    """GPT-NeoX: each head has its query, key and value rows one after another."""
    by_head = x.reshape(model.heads, 3, model.head_dim, *x.shape[1:])
    return [by_head[:, i].reshape(-1, *x.shape[1:]).T for i in range(3)]


def _join_heads(parts, model):
    rest = parts[0].T.shape[1:]
    by_head = [part.T.reshape(model.heads, 1, model.head_dim, *rest) for part in parts]
    return np.concatenate(by_head, axis=1).reshape(-1, *rest)


def _split_grouped(x, model):
    """Phi-3: all queries, then all keys, then all values, as rows."""
    q = model.heads * model.head_dim
    k = model.kv_heads * model.head_dim
    return [part.T for part in np.split(x, [q, q + k])]


def _split_halves(x, model):
    return [part.T for part in np.split(x, 2)]


def _join_rows(parts, model):
    return np.concatenate([part.T for part in parts])


LAYOUTS = {
    "same": Tensors(_keep_one, lambda parts, model: parts[0]),
    "transposed": Tensors(_transpose_one, lambda parts, model: parts[0].T),
    "columns": Tensors(_split_columns, _join_columns),
    "heads": Tensors(_split_heads, _join_heads),
    "grouped": Tensors(_split_grouped, _join_rows),
    "halves": Tensors(_split_halves, _join_rows),
}
