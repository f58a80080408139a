"""Weights of llama2.c: a `.bin` of float32, in the first layout or in version 1.

The tensors get the names of the family llama, whose table does the rest
(https://github.com/karpathy/llama2.c, export.py). llama2.c rotates neighbouring channels, and we
rotate channels half a head apart, so the rows of q and k are put in another order.

Shapes: D embed, F mlp, L layers, V vocab, H head_dim.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error
from gpt_jax.interop.keys import MOST_LAYERS
from gpt_jax.interop.tensors import Tensor

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256  # of version 1
FIELDS: tuple[str, ...] = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "seq")
LAYER = "model.layers.{}."
# The parts of a layer and their names in the family llama.
NAMES = {
    "attention_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "w1": "mlp.gate_proj.weight",
    "w2": "mlp.down_proj.weight",
    "w3": "mlp.up_proj.weight",
}
MATRICES = ("wq", "wk", "wv", "wo")
MLP = ("w1", "w2", "w3")
# The order of the tensors in a file. A part of a layer stands for all layers.
FIRST_ORDER = ("table", "attention_norm", *MATRICES, "ffn_norm", *MLP, "norm", "angles", "head")
VERSION_1_ORDER = ("attention_norm", "ffn_norm", "norm", "table", *MATRICES, *MLP, "head")


class Interleaved(NamedTuple):
    """A tensor of q or k whose rows are put in our order when it is read."""

    tensor: Tensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self) -> np.ndarray:
        """The values, the even channels of each head before its odd ones."""
        values = self.tensor.read()
        by_pair = values.reshape(-1, self.head_dim // 2, 2, values.shape[-1])
        return by_pair.swapaxes(1, 2).reshape(values.shape)


class Header(NamedTuple):
    """What a file says of itself."""

    sizes: dict[str, int]
    is_tied: bool
    start: int  # the byte at which the tensors begin
    order: tuple[str, ...]


def read_header(path: Path) -> Header:
    """The header of a file. Raises UsageError for a version that is not read, and other files."""
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {describe_error(error)}") from None
    if len(raw) < 28:
        raise UsageError(f"{path}: is no file of llama2.c: it has {len(raw)} bytes")

    magic, version = struct.unpack_from("<Ii", raw)
    if magic == MAGIC:
        if version != 1:
            raise UsageError(f"{path}: is version {version} of llama2.c; export version 0 or 1")
        sizes = dict(zip(FIELDS, struct.unpack_from("<7i", raw, 8), strict=True))
        return Header(sizes, bool(raw[36]), HEADER_BYTES, VERSION_1_ORDER)

    sizes = dict(zip(FIELDS, struct.unpack_from("<7i", raw), strict=True))
    is_tied = sizes["vocab"] > 0
    sizes["vocab"] = abs(sizes["vocab"])
    return Header(sizes, is_tied, 28, FIRST_ORDER)


def open_llama2c(path: Path) -> tuple[dict[str, Any], dict[str, Tensor | Interleaved]]:
    """The `config.json` that fits a file, and its tensors by the names of the family llama.

    Raises UsageError for a file of another kind, or of another size than its header says.
    """
    header = read_header(path)
    sizes = header.sizes
    is_sane = min(sizes.values()) > 0 and sizes["layers"] <= MOST_LAYERS
    if not is_sane or sizes["dim"] % sizes["heads"]:
        raise UsageError(f"{path}: is no file of llama2.c: its header says {sizes}")

    tensors: dict[str, Tensor | Interleaved] = {}
    place = header.start
    head_dim = sizes["dim"] // sizes["heads"]
    for part, name, shape in _list_parts(header):
        tensor = Tensor(path, place, shape, np.dtype(np.float32))
        if name:
            tensors[name] = Interleaved(tensor, head_dim) if part in ("wq", "wk") else tensor
        place += 4 * math.prod(shape)
    if place != path.stat().st_size:
        raise UsageError(
            f"{path}: has {path.stat().st_size} bytes, and its header says {place}; copy it again"
        )
    return _make_values(header), tensors


def _list_parts(header: Header) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The (part, name, shape) of each tensor in a file. The name is empty for what is not read."""
    dim, hidden, layers, heads, kv_heads, vocab, seq = header.sizes.values()
    width = dim // heads * kv_heads
    shapes = {
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
        "wq": (dim, dim),
        "wk": (width, dim),
        "wv": (width, dim),
        "wo": (dim, dim),
        "w1": (hidden, dim),
        "w2": (dim, hidden),
        "w3": (hidden, dim),
    }
    singles = {
        "table": ("model.embed_tokens.weight", (vocab, dim)),
        "norm": ("model.norm.weight", (dim,)),
        "head": ("lm_head.weight", (vocab, dim)),
        "angles": ("", (seq, dim // heads)),  # cosines and sines of the rotations
    }
    for part in header.order:
        if part == "head" and header.is_tied:
            continue
        if part in singles:
            yield (part, *singles[part])
            continue
        for layer in range(layers):
            yield part, LAYER.format(layer) + NAMES[part], shapes[part]


def _make_values(header: Header) -> dict[str, Any]:
    sizes = header.sizes
    return {
        "model_type": "llama",
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["seq"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": header.is_tied,
    }
