"""Checkpoints that are written and read a slice at a time, for models larger than the memory.

Orbax wants whole arrays. So it first writes each array with one entry, and all its own files with
that. Then the arrays get their true shapes, and their values slice by slice, through tensorstore,
on which Orbax itself stands.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint.experimental import v1 as ocp

from gpt_jax.errors import NoCheckpoint, SaveFailed
from gpt_jax.files import replace_file
from gpt_jax.train.checkpoint.arrays import nest
from gpt_jax.train.checkpoint.manifest import (
    FORMAT,
    META,
    SAVING,
    TEMPORARY,
    cause_of,
    write_manifest,
)

Slices = tuple[slice, ...]
PARAMS = "params"
# Blosc sorts the bits of the entries by their place first. So the low half of numbers that were
# bfloat16 vanishes. On such weights it writes 4 times as fast as zstd, in less room.
CODEC = {
    "name": "blosc",
    "configuration": {
        "cname": "lz4",
        "clevel": 1,
        "shuffle": "bitshuffle",
        "typesize": 4,
        "blocksize": 0,
    },
}
# Blosc takes less than 2 GiB at once.
CHUNK_BYTES = 1 << 30


class Lazy(NamedTuple):
    """A float32 array whose parts are made when they are asked for.

    The first `depth` dims are written one entry at a time: the layers of a stack, and its experts.
    """

    shape: tuple[int, ...]
    depth: int
    read: Callable[[Slices], np.ndarray]


def write_slices(
    directory: Path,
    step: int,
    arrays: Mapping[str, Lazy],
    meta: dict,
    files: Mapping[str, bytes],
    approve: Callable[[], None],
) -> None:
    """Writes the parameters `arrays`, by path, as a whole checkpoint of `step` without moments.

    `meta` is that of `Checkpoints.save`, and `files` are more files of the step. Two slices are
    held at a time: one is read while the other is written. What an earlier write left unfinished
    is removed. `approve` is called when all arrays were read. If it raises, nothing is left.
    Raises SaveFailed if the disk does not take it.
    """
    folder = directory / str(step)
    mark = directory / f"{step}{SAVING}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
        for rest in (folder, Path(f"{folder}{TEMPORARY}")):
            shutil.rmtree(rest, ignore_errors=True)

        tree: dict[str, Any] = {}
        for path, array in arrays.items():
            *parents, last = path.split("/")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = jnp.zeros((1,) * len(array.shape), jnp.float32)
        ocp.save_checkpointables_async(str(folder), {PARAMS: nest(tree, PARAMS)}).result()

        _write_arrays(folder / PARAMS, arrays)
        _correct_shapes(folder / PARAMS, arrays)
        _approve(approve, folder, mark)

        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        text = json.dumps({**meta, "step": step, "metrics": {}, "format": FORMAT})
        replace_file(folder / META, text.encode())
        write_manifest(folder)
        mark.unlink()
    except (OSError, ValueError) as error:
        raise SaveFailed(f"{folder}: writing failed: {cause_of(error)}") from error


def _approve(approve: Callable[[], None], folder: Path, mark: Path) -> None:
    """Calls `approve`. If it raises, what was written is removed."""
    try:
        approve()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        mark.unlink(missing_ok=True)
        raise


def _find_spec(folder: Path, path: str) -> dict[str, Any]:
    """Where tensorstore finds an array of a checkpoint."""
    # As a path and not as a URL, in which % and # would mean something.
    base = {"driver": "file", "path": f"{folder}/"}
    name = path.replace("/", ".") + "/"
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}


def _write_arrays(folder: Path, arrays: Mapping[str, Lazy]) -> None:
    """Writes the values of all arrays. A slice is read while the one before it is written."""
    pending = None
    try:
        for path, array in arrays.items():
            store = _make_array(folder, path, array)
            for index in list_slices(array.shape, array.depth):
                values = array.read(index)
                if pending:
                    pending.result()
                pending = store[index].write(values)
    finally:
        # A write that goes on after an error would meet a folder that is being removed.
        if pending:
            pending.result()


def choose_chunk(shape: tuple[int, ...], depth: int) -> list[int]:
    """The shape of a chunk: one slice, or an equal part of a slice beyond CHUNK_BYTES."""
    chunk = [1] * depth + list(shape[depth:])
    for dim in range(depth, len(shape)):
        too_many = max(1, math.ceil(4 * math.prod(chunk) / CHUNK_BYTES))
        chunk[dim] = math.ceil(chunk[dim] / too_many)
    return chunk


def _make_array(folder: Path, path: str, array: Lazy) -> tensorstore.TensorStore:
    """Gives an array its true shape and its chunks, still without values."""
    chunk = choose_chunk(array.shape, array.depth)
    layout = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}
    spec = _find_spec(folder, path) | {
        "metadata": {
            "shape": list(array.shape),
            "data_type": "float32",
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, CODEC],
            **layout,
        },
    }
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def list_slices(shape: tuple[int, ...], depth: int) -> Iterator[Slices]:
    """The slices of one entry in the first `depth` dims, and of all entries in the others."""
    for at in np.ndindex(*shape[:depth]):
        yield (*(slice(i, i + 1) for i in at), *(slice(0, size) for size in shape[depth:]))


def _correct_shapes(folder: Path, arrays: Mapping[str, Lazy]) -> None:
    """Writes the true shapes into the two files in which Orbax keeps them as well."""
    shapes = {path.replace("/", "."): list(array.shape) for path, array in arrays.items()}

    tree = json.loads((folder / "_METADATA").read_bytes())
    for entry in tree["tree_metadata"].values():
        name = ".".join(key["key"] for key in entry["key_metadata"])
        entry["value_metadata"]["write_shape"] = shapes[name]
    replace_file(folder / "_METADATA", json.dumps(tree).encode())

    for file in (folder / "array_metadatas").iterdir():
        table = json.loads(file.read_bytes())
        for entry in table["array_metadatas"]:
            facts = entry["array_metadata"]
            facts["write_shape"] = facts["chunk_shape"] = shapes[facts["param_name"]]
        replace_file(file, json.dumps(table).encode())


def read_slice(folder: Path, item: str, path: str, index: Slices) -> np.ndarray:
    """The part of a saved array, in the dtype it was saved in.

    `folder` is that of a step, and `item` is `params` or `ema`. Raises NoCheckpoint if it cannot
    be read.
    """
    try:
        store = tensorstore.open(_find_spec(folder / item, path)).result()
        return np.asarray(store[index].read().result())
    except ValueError as error:
        raise NoCheckpoint(f"{folder}: {path} cannot be read: {cause_of(error)}") from error
