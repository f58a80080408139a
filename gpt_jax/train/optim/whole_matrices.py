"""Runs a function on whole matrices that a mesh stores in pieces."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# The mesh axes that take whole matrices, in this order. The axes that cut matrices come first.
TAKERS = ("expert", "fsdp", "context", "tensor", "data", "pipeline")


class MatrixKind(NamedTuple):
    """The kind of matrices that travel together.

    `shape` is [rows, columns], and `cut` has the mesh axes that cut each of the two. `held` are
    the axes that already split the stack of matrices, as they do for experts.
    """

    shape: tuple[int, int]
    cut: tuple[tuple[str, ...], tuple[str, ...]]
    held: tuple[str, ...]


def on_whole_matrices(fn: Callable, stacks: list[jax.Array]) -> list[jax.Array]:
    """`fn` of every stack [..., in, out], computed on whole matrices.

    `fn` maps a stack to one of the same shape, each matrix by itself. It must map a transposed
    matrix to the transposed result, and zeros to zeros. Results have the layout of the arguments.

    On several devices, stacks of one shape and layout are joined, and so are transposed ones. They
    are padded with zeros and split over every axis that leaves a device fewer matrices. So each of
    128 devices gets two of the 156 matrices of 26 layers. One stack alone does not divide so well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [fn(x) for x in stacks]
    sizes = dict(mesh.shape)
    lists = [_listed(x, sizes) for x in stacks]
    turned = [_turns(x) for x in lists]
    lists = [_transposed(x, turn) for x, turn in zip(lists, turned, strict=True)]

    # One device has nothing to gain from joining stacks, so each is a group of its own there.
    members: dict = {}
    for i, x in enumerate(lists):
        key = (_kind(x), x.dtype) if mesh.size > 1 else i
        members.setdefault(key, []).append(i)

    results = {}
    for group in members.values():
        parts = _dealt(fn, jnp.concatenate([lists[i] for i in group], axis=1), sizes)
        for i in group:
            count = lists[i].shape[1]
            results[i] = parts[:, :count]
            parts = parts[:, count:]

    return [
        _as_before(_transposed(results[i], turn), x)
        for i, (x, turn) in enumerate(zip(stacks, turned, strict=True))
    ]


def _names(part) -> tuple[str, ...]:
    """The mesh axes of one dim of a PartitionSpec."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)


def _listed(x: jax.Array, sizes: dict[str, int]) -> jax.Array:
    """[..., in, out] as [p, n, in, out].

    The p parts lie on the devices along the axes that cut a dim of the stack.
    """
    *lead, rows, columns = jax.typeof(x).sharding.spec
    held, dim, parts = _held(x, sizes)

    def split(at):
        return at if dim is None else (*at[:dim], parts, at[dim] // parts, *at[dim + 1 :])

    x = jax.reshard(x, P(*(held if i == dim else None for i in range(len(lead))), rows, columns))
    if dim is not None:
        spec = P(*(None,) * dim, held, *(None,) * (len(lead) - dim), rows, columns)
        x = jnp.moveaxis(jax.lax.reshape(x, split(x.shape), out_sharding=spec), dim, 0)
    return jax.lax.reshape(
        x,
        (parts, math.prod(x.shape[:-2]) // parts, *x.shape[-2:]),
        out_sharding=P(held or None, None, rows, columns),
    )


def _as_before(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_listed`: `x` in the shape and layout of `like`."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    *lead, rows, columns = jax.typeof(like).sharding.spec
    held, dim, parts = _held(like, sizes)
    if dim is None:
        x = jax.lax.reshape(x, like.shape, out_sharding=P(*(None,) * len(lead), rows, columns))
    else:
        rest = (*like.shape[:dim], like.shape[dim] // parts, *like.shape[dim + 1 :])
        x = jax.lax.reshape(
            x, (parts, *rest), out_sharding=P(held, *(None,) * len(lead), rows, columns)
        )
        spec = P(*(held if i == dim else None for i in range(len(lead))), rows, columns)
        x = jax.lax.reshape(jnp.moveaxis(x, 0, dim), like.shape, out_sharding=spec)
    return jax.reshard(x, jax.typeof(like).sharding.spec)


def _held(x: jax.Array, sizes: dict[str, int]) -> tuple[tuple[str, ...], int | None, int]:
    """(mesh axes longer than 1 that cut a dim of the stack, that dim, pieces).

    At most one dim of a stack is cut. Without one the result is ((), None, 1).
    """
    for dim, part in enumerate(jax.typeof(x).sharding.spec[:-2]):
        names = tuple(name for name in _names(part) if sizes[name] > 1)
        if names:
            return names, dim, math.prod(sizes[name] for name in names)
    return (), None, 1


def _kind(x) -> MatrixKind:
    held, _, rows, columns = jax.typeof(x).sharding.spec
    return MatrixKind(x.shape[2:], (_names(rows), _names(columns)), _names(held))


def _turns(x) -> bool:
    """Whether the transpose of `x` is used, so that [D, 4 D] and [4 D, D] can be joined."""
    kind = _kind(x)
    return kind > kind._replace(shape=kind.shape[::-1], cut=kind.cut[::-1])


def _transposed(x, turn: bool):
    return jnp.swapaxes(x, 2, 3) if turn else x


def takers(count: int, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that split `count` matrices. Each of them leaves a device fewer matrices.

    `sizes` has the sizes of the mesh axes that may be used.
    """
    axes = ()
    devices = 1
    for axis in TAKERS:
        size = sizes.get(axis, 1)
        if -(-count // (devices * size)) < -(-count // devices):
            axes = (*axes, axis)
            devices *= size
    return axes


def _dealt(fn: Callable, x: jax.Array, sizes: dict[str, int]) -> jax.Array:
    """`fn` of `x` [p, n, rows, columns], computed on whole matrices and laid out as before."""
    kind = _kind(x)
    count = x.shape[1]
    axes = takers(count, {axis: size for axis, size in sizes.items() if axis not in kind.held})

    # One axis moves at a time, because the compiler makes an all-to-all of that. It answers two
    # axes at once with a gather of everything.
    steps = [_place(kind, axes[:i]) for i in range(len(axes) + 1)]
    steps.append(P(kind.held or None, axes or None))

    padding = -count % math.prod(sizes[axis] for axis in axes)
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
    for step in steps[1:]:
        x = jax.reshard(x, step)
    x = fn(x)
    for step in steps[-2::-1]:
        x = jax.reshard(x, step)
    return x[:, :count]


def _place(kind: MatrixKind, taken: tuple[str, ...]) -> P:
    """The layout of stacks that the axes `taken` split, with matrices cut over the other axes."""
    return P(
        kind.held or None,
        taken or None,
        *(tuple(axis for axis in part if axis not in taken) or None for part in kind.cut),
    )
