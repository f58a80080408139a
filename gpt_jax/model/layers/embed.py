"""Embedding tables, their sharded lookup, and the output head.

Shapes: B batch, T sequence, D embed, V vocab.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.parametrization import make_init


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of table [V, D] for tokens [B, T] -> [B, T, D]. Over a tensor-sharded vocabulary each
    device looks up what it holds and the parts are summed (Shoeybi et al. 2019). In float32: the
    backward pass sums rows of equal tokens."""

    def rows(table, tokens):
        return table[tokens]

    def own_rows(table, tokens):
        mine = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        inside = (mine >= 0) & (mine < table.shape[0])
        found = jnp.where(inside[..., None], table[jnp.clip(mine, 0, table.shape[0] - 1)], 0)
        return jax.lax.psum(found, "tensor")

    return look_up(
        rows if sharding.axis_size("tensor") == 1 else own_rows,
        table,
        ("vocab", "embed"),
        tokens,
        "batch",
    )


def look_up(function, table, axes: tuple[str, str], index, rows: str | None):
    """function(table [., D], index [B, T]) -> [B, T, D] on each device. The table, of logical
    `axes`, is gathered there: so its gradient is scattered, and not summed whole on every
    device. `rows`: the axis of B."""
    where, wide = sharding.find_gathered_axes(table, axes), sharding.STORED[axes[1]]
    if where:
        dim, names = where

        def gather(table, index):
            return function(sharding.gather(table, names, dim), index)

    with sharding.using_rules({axes[1]: wide} if where else {}):
        mapped = sharding.run_local(
            gather if where else function, (axes, (rows, "seq")), (rows, "seq", None)
        )
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
    """Learned positions: [1, T] `shared` by all rows, or [B, T] -> the same with a dim D."""

    model: config.Model

    @nn.compact
    def __call__(self, position, shared: bool):
        axes = ("position", "embed")
        table = self.param(
            "table",
            sharding.stored_init(make_init("position", self.model), axes),
            (self.model.max_seq, self.model.embed),
        )
        return look_up(
            lambda table, index: table[index], table, axes, position, None if shared else "batch"
        )


class Head(nn.Module):
    """The untied output matrix [D, V]."""

    model: config.Model

    @nn.compact
    def __call__(self, dtype):
        axes = ("embed", "vocab")
        kernel = self.param(
            "kernel",
            sharding.stored_init(make_init("head", self.model), axes),
            (self.model.embed, self.model.vocab),
        )
        return sharding.use_weight(kernel, axes, dtype)
