"""A `.weights.h5` of Keras 3 that holds the model of `configs/guide.py`.

Such a file has arrays and the names of layers, and no architecture. Groups lie below `layers`, one
for each layer or sublayer, with its arrays in `vars/0`, `vars/1`, … What Keras calls a sublayer is
up to the author, so parts are told by their shapes, and by `query_dense` and the like, which are
the names of `keras.layers.MultiHeadAttention`. The rest is taken from `configs/guide.py`.

Shapes: D embed, F mlp, N heads, H head_dim, V vocab, T positions.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.errors import UsageError

ATTENTION = {"query_dense": "q", "key_dense": "k", "value_dense": "v", "output_dense": "out"}


class KerasTensor(NamedTuple):
    """An array of the file, read when it is asked for, in another shape of the same size."""

    file: Path
    name: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The values. Raises UsageError if they cannot be read."""
        try:
            with _open(self.file) as file:
                return np.asarray(file[self.name]).reshape(self.shape)
        except (OSError, KeyError) as error:
            raise UsageError(f"{self.file}: {self.name}: {error}") from None


def _open(path: Path) -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports] an extra
    except ImportError:
        raise UsageError(
            f"{path}: needs the h5py package; install it with pip install 'gpt_jax[keras]'"
        ) from None
    return h5py.File(path, "r")


def list_arrays(path: Path) -> dict[str, dict[int, KerasTensor]]:
    """{layer: {number: array}} of a file. Raises UsageError for a file of another kind."""
    layers: dict[str, dict[int, KerasTensor]] = {}

    def visit(name: str, node: Any) -> None:
        match = re.fullmatch(r"(?:_layer_checkpoint_dependencies|layers)/(.+)/vars/(\d+)", name)
        if match and hasattr(node, "shape"):
            tensor = KerasTensor(path, name, node.shape, node.shape)
            layers.setdefault(match[1], {})[int(match[2])] = tensor

    try:
        with _open(path) as file:
            file.visititems(visit)
    except OSError as error:
        raise UsageError(f"{path}: is no file of HDF5 ({error})") from None
    if not layers:
        raise UsageError(f"{path}: is no .weights.h5 of Keras 3: it has no layers with arrays")
    return layers


def _order(name: str) -> list[tuple[int, str]]:
    """A key that sorts block, block_1, block_2, block_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def open_keras(path: Path) -> tuple[dict[str, Any], Mapping[str, KerasTensor]]:
    """The settings of the family guide, and the tensors of the model by name.

    Raises UsageError for a file that is not the model of configs/guide.py, and without h5py.
    """
    layers = list_arrays(path)
    queries = sorted((n for n in layers if n.endswith("/query_dense")), key=_order)
    if not queries or any(name.count("/") < 2 for name in queries):
        raise UsageError(f"{path}: has no block with a MultiHeadAttention in it")
    attentions = [name.removesuffix("/query_dense") for name in queries]
    tensors: dict[str, KerasTensor] = {}
    used = set()
    for number, attention in enumerate(attentions):
        block = attention.rpartition("/")[0] + "/"
        own = {name: arrays for name, arrays in layers.items() if name.startswith(block)}
        used |= own.keys()
        tensors |= {f"blocks.{number}.{n}": t for n, t in _name_block(path, own, attention)}
    tensors |= _name_tables(path, {n: a for n, a in layers.items() if n not in used})

    embed, heads, head_dim = layers[queries[0]][0].stored
    values = {
        "model_type": "guide",
        "hidden_size": embed,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_hidden_layers": len(queries),
        "intermediate_size": tensors["blocks.0.up.0"].shape[1],
        "vocab_size": tensors["tokens.0"].shape[0],
        "max_position_embeddings": tensors["positions.0"].shape[0],
    }
    return values, tensors


def _name_block(path: Path, layers, attention: str) -> Iterator[tuple[str, KerasTensor]]:
    """(name, tensor) of all arrays of one block."""
    query = layers[f"{attention}/query_dense"][0].stored
    if len(query) != 3:
        raise UsageError(f"{path}: {attention}/query_dense is {list(query)}; expected [D, N, H]")
    embed, width = query[0], query[1] * query[2]
    for theirs, ours in ATTENTION.items():
        for number, tensor in layers.get(f"{attention}/{theirs}", {}).items():
            shape = (-1, embed) if theirs == "output_dense" else (embed, -1)
            size = int(np.prod(tensor.stored))
            flat = (size,) if number else tuple(size // embed if n < 0 else n for n in shape)
            if not number and size != embed * width:
                flat = tensor.stored
            yield f"{ours}.{number}", tensor._replace(shape=flat)

    rest = [layers[n] for n in sorted(layers, key=_order) if not n.startswith(f"{attention}/")]
    dense = [arrays for arrays in rest if len(arrays[0].stored) == 2]
    norms = [arrays for arrays in rest if len(arrays[0].stored) == 1]
    if len(dense) != 2 or len(norms) != 2 or len(dense) + len(norms) != len(rest):
        raise UsageError(
            f"{path}: beside {attention} are {len(dense)} maps and {len(norms)} norms of "
            f"{len(rest)} layers; the guide's block has 2 and 2"
        )
    # Where both maps are square, their names tell the order.
    if dense[0][0].stored[0] != embed:
        dense.reverse()
    for name, arrays in zip(("up", "down", "norm1", "norm2"), dense + norms, strict=True):
        for number, tensor in arrays.items():
            yield f"{name}.{number}", tensor


def _name_tables(path: Path, layers) -> dict[str, KerasTensor]:
    """The embedding, the positions and the head. Raises UsageError for a head with a bias."""
    tables = {n: arrays for n, arrays in layers.items() if len(arrays[0].stored) == 2}
    positions = [name for name in tables if "pos" in name.rpartition("/")[2].lower()]
    heads = [n for n in tables if "/" not in n and n not in positions and "emb" not in n.lower()]
    tokens = [name for name in tables if name not in (*positions, *heads)]
    if [len(positions), len(heads), len(tokens), len(layers)] != [1, 1, 1, 3]:
        raise UsageError(
            f"{path}: {', '.join(sorted(layers))} are not an embedding, positions and a head, by "
            "names with emb, pos, and neither"
        )
    head = tables[heads[0]]
    if 1 in head and np.any(head[1].read()):
        raise UsageError(
            f"{path}: {heads[0]} has a bias, which no model here has; make that layer with "
            "use_bias=False"
        )
    return {
        "tokens.0": tables[tokens[0]][0],
        "positions.0": tables[positions[0]][0],
        "head.0": head[0],
    }
