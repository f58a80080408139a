"""Checkpoints that hold adapters alone, and the weights beneath them, which lie elsewhere.

Such a checkpoint names the place of the weights, and their fingerprint. The fingerprint is made of
the values themselves: it is the same in any format, at any place and on any mesh.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config as configs, sharding
from gpt_jax.data import is_remote
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.files import digest_json
from gpt_jax.interop import Origin
from gpt_jax.model import describe_parameter
from gpt_jax.train import (
    BASE,
    find_matrices,
    init_adapters,
    list_parts,
    list_slices,
    merge_adapters,
    read_slice,
    restore_checkpoint,
    take_params,
)

# Odd constants of hash functions (the golden ratio, and one of xxHash).
SPREAD = np.uint32(0x9E3779B1)
MIX = np.uint32(0x85EBCA77)


# ---- fingerprints --------------------------------------------------------------------------------


def sum_bits(bits, position):
    """Two sums modulo 2^32 that depend on every bit and on where it stands."""
    factor = position * SPREAD | np.uint32(1)
    mixed = bits * factor
    mixed = (mixed ^ (mixed >> np.uint32(15))) * MIX
    other = ((mixed >> np.uint32(16)) ^ bits) * factor
    return mixed.sum(dtype=bits.dtype), other.sum(dtype=bits.dtype)


def find_strides(shape: tuple[int, ...]) -> list[int]:
    """How far apart neighbours of each dim are in memory, modulo 2^32."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size % 2**32)
    return strides[: len(shape)]


def _sum_array(x: jax.Array):
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, stride in enumerate(find_strides(x.shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        position = position + place * np.uint32(stride)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return sum_bits(bits, sharding.lay_out_like(position, bits))


@jax.jit
def _sum_tree(params):
    return jax.tree.map(_sum_array, params)


def fingerprint(params) -> str:
    """20 hex digits of the values of all weights, whatever their layout on the mesh."""
    sums = jax.device_get(_sum_tree(params))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = jax.tree.leaves(sums, is_leaf=lambda node: isinstance(node, tuple))
    return combine(
        {
            sharding.join_path(keys): (leaf.shape, *map(int, pair))
            for (keys, leaf), pair in zip(leaves, pairs, strict=True)
        }
    )


def combine(sums: Mapping[str, tuple]) -> str:
    """The fingerprint of sums by path, each with the shape of its array."""
    return digest_json(sorted([path, *map(_as_list, entry)] for path, entry in sums.items()))


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


def fingerprint_slices(
    shapes: Mapping[str, tuple[int, ...]], depths: Mapping[str, int], read: Callable
) -> str:
    """The same fingerprint of weights that `read(path, index)` gives, a slice at a time."""
    sums = {}
    for path, shape in shapes.items():
        strides = np.array(find_strides(shape), np.uint32)
        total = np.zeros(2, np.uint32)
        for index in list_slices(shape, depths[path]):
            values = np.ascontiguousarray(read(path, index), np.float32)
            starts = [part.start for part in index]
            position = np.zeros(values.shape, np.uint32)
            for dim, stride in enumerate(strides):
                places = np.arange(values.shape[dim], dtype=np.uint32) + np.uint32(starts[dim])
                tail = [1] * (values.ndim - dim - 1)
                position += (places * stride).reshape(-1, *tail)
            total += np.array(sum_bits(values.view(np.uint32), position), np.uint32)
        sums[path] = (shape, *map(int, total))
    return combine(sums)


# ---- the weights beneath -------------------------------------------------------------------------


def make_base_entry(init: configs.Init, lineage: list[dict[str, Any]], params) -> dict[str, Any]:
    """What a checkpoint says of the weights beneath its adapters. `lineage` is theirs."""
    place = find_place(lineage[-1])
    return {"from": place, "averaged": init.averaged, "fingerprint": fingerprint(params)}


def find_place(entry: dict[str, Any]) -> str:
    """The place of the weights that an entry of a lineage tells, from any folder."""
    place = entry["from"]
    if not is_remote(place):
        place = str(Path(place).absolute())
    return place if "family" in entry else f"{place}@{entry['step']}"


def choose_base(meta: dict, given: str, name: str) -> dict[str, Any] | None:
    """What lies beneath the adapters of the checkpoint `name`. It is None without adapters.

    `given` is where the weights are now, or "" if they have not moved. Raises UsageError if it is
    given for a checkpoint without adapters.
    """
    base = meta.get("base")
    if not given:
        return base
    if base is None:
        raise UsageError(f"--base={given}: {name} has no adapters; leave it out")
    return base | {"from": given}


def check_fingerprint(base: dict[str, Any], own: str, name: str) -> None:
    """Raises UsageError if the weights at the base's place are others than those of before."""
    if own != base["fingerprint"]:
        raise UsageError(
            f"{name}: its adapters were learned beside other weights ({base['fingerprint']}) than "
            f"{base['from']} has now ({own}); name the place of those of before with "
            "--base=DIR, and with config.init.from in training"
        )


def explain_base(base: dict[str, Any], error: Exception, name: str) -> UsageError:
    """What is raised if the weights beneath the adapters of `name` cannot be read."""
    return UsageError(
        f"{name}: its adapters need the weights at {base['from']}, which cannot be read "
        f"({error}); name the place where they are now with --base=DIR, and with "
        "config.init.from in training"
    )


def restore_base(open_source: Callable, base: dict[str, Any], name: str, abstract, say):
    """(the weights beneath the adapters of the checkpoint `name`, `base` with their whole place).

    They are laid out like `abstract`. `open_source` is that of source.py. Raises UsageError if they
    cannot be read or are others.
    """
    item = "ema" if base["averaged"] else "params"
    try:
        source = open_source(base["from"], say)
        params = source.restore({item: abstract})[item]
    except (UsageError, NoCheckpoint) as error:
        raise explain_base(base, error, name) from None
    check_fingerprint(base, fingerprint(params), name)
    return params, base | {"from": find_place(source.lineage[-1])}


def restore_merged(
    open_source: Callable,
    base: dict[str, Any],
    lora: configs.Lora,
    directory: Path,
    step: int,
    item: str,
    abstract,
    say,
):
    """The whole weights of a checkpoint that holds adapters alone, on the current mesh."""
    weights, _ = restore_base(open_source, base, f"step {step} of {directory}", abstract, say)
    like = abstract_adapters(lora, abstract)
    adapters = restore_checkpoint(directory, step, {item: like})[item]
    return make_merge(lora)(adapters, {BASE: weights})


# ---- a slice at a time ---------------------------------------------------------------------------


def read_adapters(
    folder: Path, item: str, lora: configs.Lora, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, np.ndarray]]:
    """The adapters of a step, on the host: {path of the matrix: {name of the part: values}}."""
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    parts = list_parts(lora)
    return {
        path: {part: read_slice(folder, item, f"{path}/{part}", (slice(None),)) for part in parts}
        for path in find_matrices(lora, like, describe_parameter)
    }


def read_merged(
    base: Origin, adapters: Mapping[str, dict[str, np.ndarray]], lora: configs.Lora
) -> Callable[[str, Any], np.ndarray]:
    """The function `(path, index) -> values` of weights with the adapters in them."""

    def read(path, index):
        if path not in adapters:
            return base.read(path, index)
        # The length of a column is that of all its entries.
        *lead, rows, columns = index
        weight = base.read(path, (*lead, slice(None), slice(None)))
        adapter = {part: values[tuple(lead)] for part, values in adapters[path].items()}
        merged = merge_adapters(lora, {path: adapter}, {path: weight})[path]
        return np.asarray(merged)[(..., rows, columns)]

    return read


def abstract_adapters(lora: configs.Lora, abstract):
    """Shapes, dtypes and shardings of the adapters of a model."""

    def make(params):
        return init_adapters(lora, params, describe_parameter, jax.random.key(0))

    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    return sharding.make_concrete(jax.eval_shape(make, abstract), mesh)


# ---- what a run learns ---------------------------------------------------------------------------


def choose_learned(config: configs.Config, params):
    """What a run that starts from `params` learns: all of them, or adapters beside them."""
    if not config.lora.rank:
        return params
    # Fresh weights have the seed's own key, and steps have that with 1.
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return init_adapters(config.lora, params, describe_parameter, key)


def make_merge(lora: configs.Lora) -> Callable:
    """The function of (learned, frozen) that gives the whole parameters of the model."""
    if not lora.rank:
        return take_params
    return jax.jit(lambda adapters, frozen: merge_adapters(lora, adapters, frozen[BASE]))
