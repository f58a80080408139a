"""Matrices that are cut over a mesh, whole on single devices for a moment (called by muon)."""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Mesh axes that take whole matrices, in this order: first those that cut the matrices themselves.
TAKERS = ("expert", "fsdp", "context", "tensor", "data", "pipeline")


class Kind(NamedTuple):
    """Matrices that travel together: [rows, columns], and the mesh axes over which each is cut."""

    shape: tuple[int, int]
    cut: tuple[tuple[str, ...], tuple[str, ...]]


def on_whole_matrices(fn: Callable, stacks: list[jax.Array]) -> list[jax.Array]:
    """`fn` of every stack [L, in, out], where it has whole matrices to work on. `fn` maps stacks to stacks of their
    shape, each matrix by itself, a transposed one to the transposed result and zeros to zeros.

    On several devices, stacks of one shape and layout (transposed ones too) are joined, padded with zeros and dealt out over as many
    axes as leave a device fewer matrices: the 156 of 26 layers are two for each of 128 devices, where one stack at a time
    does not divide them. One axis moves at a time, which the compiler makes an all-to-all of; two at once it answers with
    a gather of everything. Results lie as what came in."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [fn(x) for x in stacks]
    if mesh.size == 1:  # whole, and by their types still cut over axes of size 1
        return [_dealt(fn, x, mesh.shape) for x in stacks]
    turned = [_turns(x) for x in stacks]
    stacks = [_transposed(x, turn) for x, turn in zip(stacks, turned)]
    members: dict[tuple, list[int]] = {}
    for i, x in enumerate(stacks):
        members.setdefault((_kind(x), x.dtype), []).append(i)
    done = {}
    for these in members.values():
        parts = _dealt(fn, jnp.concatenate([stacks[i] for i in these]), mesh.shape)
        for i in these:
            done[i], parts = parts[:len(stacks[i])], parts[len(stacks[i]):]
    return [_transposed(done[i], turn) for i, turn in enumerate(turned)]


def _kind(x) -> Kind:
    _, *dims = jax.typeof(x).sharding.spec
    return Kind(x.shape[1:], tuple(() if part is None else (part,) if isinstance(part, str) else tuple(part)
                                   for part in dims))


def _turns(x) -> bool:
    """Whether it is its transpose that is dealt out, so that [D, 4 D] and [4 D, D] may go together."""
    kind = _kind(x)
    return kind > Kind(kind.shape[::-1], kind.cut[::-1])


def _transposed(x, turn: bool):
    return jnp.swapaxes(x, 1, 2) if turn else x


def takers(count: int, sizes: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes (of these sizes) over which `count` matrices are dealt out: each leaves a device fewer of them."""
    found, devices = (), 1
    for axis in TAKERS:
        size = sizes.get(axis, 1)
        if -(-count // (devices * size)) < -(-count // devices):
            found, devices = (*found, axis), devices * size
    return found


def _dealt(fn: Callable, x: jax.Array, sizes: dict[str, int]) -> jax.Array:
    kind, axes, count, devices = _kind(x), takers(len(x), sizes), len(x), 1
    for axis in axes:
        devices *= sizes[axis]
    steps = [_place(axes[:i], kind.cut) for i in range(len(axes) + 1)] + [P(axes or None)]
    x = jnp.pad(x, ((0, -count % devices), (0, 0), (0, 0)))
    for step in steps[1:]:
        x = jax.reshard(x, step)
    x = fn(x)
    for step in steps[-2::-1]:
        x = jax.reshard(x, step)
    return x[:count]


def _place(taken: tuple[str, ...], cut: tuple) -> P:
    """Stacks dealt out over the axes `taken`, their matrices cut over what is left of `cut`."""
    return P(taken or None, *(tuple(axis for axis in part if axis not in taken) or None for part in cut))
