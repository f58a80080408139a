"""Moves arrays between the memory of the devices and that of their hosts.

An array on the host keeps its layout over the mesh: each host has what its devices would have.
"""

import jax

# The kind of memory on the host that devices read and write directly.
HOST = "pinned_host"


def _is_moved(leaf) -> bool:
    """Counters stay on the devices. They are nothing to save, and each move is a copy."""
    return leaf.ndim > 0


def to_host(tree):
    """Every array of `tree` in the memory of its device's host. Call it under jit."""
    return _move(tree, jax.memory.Space.Host)


def to_device(tree):
    """Every array of `tree` in the memory of its device. Call it under jit."""
    return _move(tree, jax.memory.Space.Device)


def _move(tree, space):
    return jax.tree.map(lambda x: jax.device_put(x, space) if _is_moved(x) else x, tree)


def describe_on_host(abstract):
    """What `to_host` makes of ShapeDtypeStructs with concrete shardings, as Orbax needs them.

    `jax.eval_shape` forgets in which memory an array lies.
    """

    def place(x):
        if not _is_moved(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST))

    return jax.tree.map(place, abstract)


def is_on_host(leaf) -> bool:
    """Whether an array, or a ShapeDtypeStruct with a concrete sharding, lies on the host."""
    return leaf.sharding.memory_kind == HOST
