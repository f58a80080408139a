"""Embedding tables, their sharded lookup, and the output head.

Shapes: B batch, T sequence, D embed, V vocab.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.parametrization import make_init

TABLE_AXES = ("vocab", "embed")


def lookup(table: jax.Array, tokens: jax.Array, dtype, asked: str) -> jax.Array:
    """Looks up the rows of table [V, D] for tokens [B, T] -> [B, T, D], rounded to `dtype`.

    `asked` is a value of compute.embed_lookup. The table stays float32 until its rows are looked
    up, because its gradient sums the rows of equal tokens.

    Over a tensor-sharded vocabulary each device looks up its own rows, and the parts are summed
    (Shoeybi et al. 2019).
    """
    is_cut = sharding.axis_size("tensor") > 1
    take = _take_own_rows if is_cut else _take_rows
    add_up = _sum_over_tensor if is_cut else _keep

    names = _find_column_axes(table)
    if names and _choose_way(table, tokens, dtype, asked, names) == "columns":
        return _exchange_columns(take, add_up, names, table, tokens, dtype)

    def take_sum(table, tokens):
        return add_up(take(table, tokens))

    return look_up_locally(take_sum, table, TABLE_AXES, tokens, "batch").astype(dtype)


def _find_column_axes(table) -> tuple[str, ...]:
    """The mesh axes whose devices share the columns of a table, and have tokens of their own.

    There are none if every device has all columns. There are none in decoding over `context`
    either, because its devices have the same tokens.
    """
    gathered = sharding.find_gathered_axes(table, TABLE_AXES)
    if gathered is None:
        return ()
    has_own_tokens = sharding.count_parts("seq") == sharding.axis_size("context")
    return gathered[1] if has_own_tokens else ()


def _choose_way(table, tokens, dtype, asked: str, names: tuple[str, ...]) -> str:
    """Chooses a row of `config.count_lookup_bytes` for the sizes of these arrays."""
    sizes = config.LookupSizes(
        rows=table.shape[0] // sharding.axis_size("tensor"),
        width=table.shape[1],
        tokens=tokens.size // sharding.count_parts("batch") // sharding.count_parts("seq"),
        devices=math.prod(map(sharding.axis_size, names)),
        entry=jnp.dtype(dtype).itemsize,
    )
    return config.choose_embed_lookup(asked, sizes)


def _exchange_columns(take, add_up, names: tuple[str, ...], table, tokens, dtype):
    """Looks up each device's own columns for the tokens of all devices that share the table.

    An exchange then gives each device all columns of its own tokens. The gradient goes back the
    same way, and is summed where the columns are stored. Both travel in `dtype`.
    """

    def look_up(table, tokens):
        everyones = jax.lax.all_gather(tokens.ravel(), names)
        columns = take(table, everyones).astype(dtype)
        # An exchange that also put the columns side by side would take six times the cycles on
        # v5e (llama:8b's embedding on 16 chips, libtpu 0.0.42).
        parts = jax.lax.all_to_all(columns, names, split_axis=0, concat_axis=0, tiled=True)
        rows = parts.transpose(1, 0, 2)

        # The sum over tensor comes last, in float32. JAX divides a gradient by the devices along
        # tensor before it sums over them, and a narrower dtype would round the quotient.
        return add_up(rows.astype(jnp.float32)).reshape(*tokens.shape, -1)

    with sharding.using_rules({"embed": sharding.STORED["embed"]}):
        mapped = sharding.run_local(look_up, (TABLE_AXES, ("batch", "seq")), ("batch", "seq", None))
        return mapped(table.astype(jnp.float32), tokens).astype(dtype)


def _take_rows(table, index):
    return table[index]


def _take_own_rows(table, tokens):
    """Looks up those tokens whose rows this device has. The rows of all others are zero."""
    count = table.shape[0]
    place = tokens - jax.lax.axis_index("tensor") * count
    is_here = (place >= 0) & (place < count)
    return jnp.where(is_here[..., None], table[jnp.clip(place, 0, count - 1)], 0)


def _sum_over_tensor(rows):
    return jax.lax.psum(rows, "tensor")


def _keep(rows):
    return rows


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
    """A table [rows, features] and its lookup, as compute.embed_lookup says."""

    rows: int
    features: int
    role: str
    model: config.Model
    asked: str

    def setup(self):
        init = sharding.stored_init(make_init(self.role, self.model), TABLE_AXES)
        self.table = self.param("table", init, (self.rows, self.features))

    def __call__(self, tokens, dtype):
        return lookup(self.table, tokens, dtype, self.asked)


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
