"""Rows of a batch on a mesh: which a process has, and how their tokens lie over `context`."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from gpt_jax.config import BATCH_AXES
from gpt_jax.errors import UsageError
from gpt_jax.sharding import layout, rules


def token_order(length: int, pieces: int) -> np.ndarray:
    """Which token [T] stands at each place of a row that is cut over `pieces` devices.

    Device i holds the i-th and the i-th last of 2 * pieces equal chunks. Causal attention is then
    equal work for all devices (Megatron-LM's context parallelism).
    """
    if pieces == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * pieces, -1)
    return np.concatenate([chunks[[i, 2 * pieces - 1 - i]].ravel() for i in range(pieces)])


def reorder(x: jax.Array, back: bool = False) -> jax.Array:
    """`x` [B, T, …] moved from the text's order to the mesh's, or back. T must not be split."""
    pieces = rules.count_parts("seq")
    if pieces == 1:
        return x

    places = token_order(x.shape[1], pieces)
    return jnp.take(x, np.argsort(places) if back else places, axis=1)


def make_positions(length: int) -> jax.Array:
    """0 … T - 1 as [1, T], in the mesh's order."""
    return layout.constrain(reorder(jnp.arange(length)[None]), None, "seq")


def apply_in_text_order(
    fn: Callable, x: jax.Array, batch: str, seq: str, *rest: str | None
) -> jax.Array:
    """`fn` of x [B, T, …] with whole rows in the text's order.

    The result is laid out by the logical axes `batch`, `seq` and `rest`.

    It is for functions other than attention that look along a row.
    """
    # Rows are named whole also where the axis has one device, because JAX refuses a sum along a
    # dim that any axis is laid over.
    rows = layout.constrain(x, batch, *(None,) * (x.ndim - 1))
    return layout.constrain(reorder(fn(reorder(rows, back=True))), batch, seq, *rest)


# ---- batches ----


def row_parts(mesh: Mesh) -> int:
    """Pieces into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The contiguous rows of a global batch that this process's devices hold.

    Raises UsageError if those rows are not contiguous.
    """
    here = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((batch_size,))
    slices = sorted({index[0].indices(batch_size)[:2] for index in here.values() if index})
    start = slices[0][0]
    stop = slices[-1][1]
    if any(end != begin for (_, end), (begin, _) in itertools.pairwise(slices)):
        raise UsageError(
            "config.mesh: this process's devices hold rows of the batch that are not contiguous; "
            "put config.mesh.tensor and config.mesh.context inside a process"
        )
    return slice(start, stop)


def to_devices(mesh: Mesh, columns: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's rows [b, T] of every column, as global arrays [batch_size, T] on the mesh.

    The tokens of a row are in the mesh's order.
    """
    sharding = NamedSharding(mesh, rules.batch_spec())
    pieces = mesh.shape["context"]
    if pieces > 1:
        columns = {
            name: value[:, token_order(value.shape[1], pieces)] for name, value in columns.items()
        }

    # When this process has all rows, one call for all columns takes half the time.
    if sharding.is_fully_addressable:
        return jax.device_put(columns, sharding)

    first = process_rows(mesh, batch_size).start

    def to_global(value):
        def read_part(index):
            start, stop, _ = index[0].indices(batch_size)
            return value[start - first : stop - first, index[1]]

        shape = (batch_size, *value.shape[1:])
        return jax.make_array_from_callback(shape, sharding, read_part)

    return {name: to_global(value) for name, value in columns.items()}
