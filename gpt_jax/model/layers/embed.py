"""Embedding tables, their sharded lookup, and the output head.

Shapes: B batch, T sequence, D embed, V vocab.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.parametrization import make_init


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks up the rows of table [V, D] for tokens [B, T] -> [B, T, D] in float32.

    Over a tensor-sharded vocabulary each device looks up its own rows, and the parts are summed
    (Shoeybi et al. 2019). The lookup is in float32 because its backward pass sums the rows of
    equal tokens.
    """
    is_cut = sharding.axis_size("tensor") > 1
    function = _take_own_rows if is_cut else _take_rows
    return look_up_locally(function, table, ("vocab", "embed"), tokens, "batch")


def _take_rows(table, index):
    return table[index]


def _take_own_rows(table, tokens):
    """Looks up those tokens whose rows this device has, and sums over the mesh axis tensor."""
    count = table.shape[0]
    place = tokens - jax.lax.axis_index("tensor") * count
    is_here = (place >= 0) & (place < count)
    rows = jnp.where(is_here[..., None], table[jnp.clip(place, 0, count - 1)], 0)
    return jax.lax.psum(rows, "tensor")


def look_up_locally(function, table, axes: tuple[str, str], index, rows: str | None):
    """Runs function(table [., D], index [B, T]) -> [B, T, D] on each device.

    `axes` are the logical axes of the table. `rows` is the logical axis of B.

    A table that is stored in parts is gathered inside, on the device. Its gradient is therefore
    scattered, and not summed whole on every device.
    """
    in_axes = (axes, (rows, "seq"))
    out_axes = (rows, "seq", None)
    gathered = sharding.find_gathered_axes(table, axes)
    if gathered is None:
        mapped = sharding.run_local(function, in_axes, out_axes)
        return mapped(table.astype(jnp.float32), index)

    dim, names = gathered

    def gather_and_look_up(table, index):
        return function(sharding.gather(table, names, dim), index)

    with sharding.using_rules({axes[1]: sharding.STORED[axes[1]]}):
        mapped = sharding.run_local(gather_and_look_up, in_axes, out_axes)
        return mapped(table.astype(jnp.float32), index)


class Embed(nn.Module):
    """A table [rows, features] and its lookup."""

    rows: int
    features: int
    role: str
    model: config.Model

    def setup(self):
        init = sharding.stored_init(make_init(self.role, self.model), ("vocab", "embed"))
        self.table = self.param("table", init, (self.rows, self.features))

    def __call__(self, tokens):
        return lookup(self.table, tokens)


class PositionTable(nn.Module):
    """Looks up learned positions [B or 1, T] -> [B or 1, T, D]. `shared`: all rows have one set."""

    model: config.Model

    @nn.compact
    def __call__(self, position, shared: bool):
        axes = ("position", "embed")
        init = sharding.stored_init(make_init("position", self.model), axes)
        table = self.param("table", init, (self.model.max_seq, self.model.embed))
        rows = None if shared else "batch"
        return look_up_locally(_take_rows, table, axes, position, rows)


class Head(nn.Module):
    """The untied output matrix [D, V], rounded to `dtype`.

    Its own dtype is the one in which devices sum its gradient.
    """

    model: config.Model

    @nn.compact
    def __call__(self, dtype, gradient_dtype):
        axes = ("embed", "vocab")
        init = sharding.stored_init(make_init("head", self.model), axes)
        kernel = self.param("kernel", init, (self.model.embed, self.model.vocab))
        return sharding.use_weight(kernel, axes, dtype, gradient_dtype)


@jax.custom_vjp
def transpose_table(table):
    """Turns a table [V, D] into an output matrix [D, V].

    In the backward pass a barrier keeps the transpose apart from the matmul before it. XLA's CPU
    backend of jaxlib 0.10 joins them, and has no kernel for the result where that is a float32
    product of bfloat16.
    """
    return table.T


def _transpose_table_forward(table):
    return transpose_table(table), None


def _transpose_table_backward(_, g):
    return (jax.lax.optimization_barrier(g).T,)


transpose_table.defvjp(_transpose_table_forward, _transpose_table_backward)
