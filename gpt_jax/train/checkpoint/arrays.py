"""The arrays of a checkpoint: how trees are stored, and how they are read back.

Trees are stored as nested dicts with string keys (`train/opt/0/mu/…`). NamedTuples and empty
subtrees come back from the caller's own abstract tree.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint.experimental import v1 as ocp

from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.sharding import join_path
from gpt_jax.train.checkpoint.manifest import cause_of


def nest(tree, what: str) -> dict:
    """A pytree of jax arrays or ShapeDtypeStructs, as nested dicts with string keys.

    Empty subtrees vanish. Raises TypeError for a tree that would be saved and not come back: one
    with typed keys, with arrays without elements, or without arrays.
    """
    out = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"{what} {join_path(path)}: {type(leaf).__name__} is not a jax array")
        if leaf.size == 0 or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{what} {join_path(path)}: {leaf.dtype}{list(leaf.shape)} cannot be stored; "
                "store the key data of a typed key, and no empty arrays"
            )

        *parents, last = [join_path((key,)) for key in path] or ["value"]
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        if last in node:
            raise TypeError(f"{what} {join_path(path)}: two leaves share this name")
        node[last] = leaf

    if not out:
        raise TypeError(f"{what}: no array in it")
    return out


def restore_checkpoint(directory, step: int, wanted: dict) -> dict:
    """The saved trees, to the bit: `{"params": …}` for `wanted = {"params": abstract tree}`.

    Only the trees in `wanted` are read. Their leaves are jax.ShapeDtypeStructs with concrete
    shardings, on any mesh and process count. All processes call it. Raises UsageError, which names
    the first array that is missing, left over, or of another shape or dtype. Raises NoCheckpoint if
    the files cannot be read. It does not compare checksums: `latest_valid` and `resolve_checkpoint`
    do.
    """
    folder = Path(directory).absolute() / str(step)
    nested = {name: nest(tree, name) for name, tree in wanted.items()}
    for name, tree in nested.items():
        metadata = _read(folder, lambda name=name: ocp.metadata(str(folder), name).metadata)
        _compare_layout(folder, name, _flat(metadata), _flat(tree))

    loaded = _read(folder, lambda: ocp.load_checkpointables(str(folder), nested))
    trees = {}
    for name, tree in wanted.items():
        arrays = _flat(loaded[name])
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        values = [arrays[join_path(path) or "value"] for path, _ in leaves]
        trees[name] = jax.tree.unflatten(structure, values)
    return trees


def _read(folder: Path, read):
    """The result of `read()`. Raises NoCheckpoint for whatever it raises."""
    try:
        return read()
    except Exception as error:
        raise NoCheckpoint(f"{folder}: cannot be restored: {cause_of(error)}") from error


def _flat(tree) -> dict:
    return {join_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _compare_layout(folder: Path, item: str, saved: dict, wanted: dict) -> None:
    """Raises UsageError if `saved` has other arrays, shapes or dtypes than `wanted`.

    It must be called before loading, because Orbax casts dtypes silently and calls a wrong shape
    an 'incompatible handler'.
    """

    def show(leaf):
        return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    def facts(leaf):
        return None if leaf is None else (tuple(leaf.shape), leaf.dtype)

    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        old = saved.get(name)
        new = wanted.get(name)
        if new is None or facts(old) != facts(new):
            raise UsageError(
                f"checkpoint {folder}: {item} {name} is {show(old)} there and {show(new)} in this "
                "run; use the config of the checkpoint, or another workdir"
            )
        if not isinstance(new.sharding, jax.sharding.Sharding):
            raise TypeError(f"{item} {name}: the abstract array has no sharding")
