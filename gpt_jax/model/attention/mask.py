"""Which keys a query may see.

Shapes: B batch, T sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pattern(NamedTuple):
    """Which keys a query may look at.

    `window` counts the keys within reach, the query's own included. 0 puts all within reach.

    `segment` [B, T] keeps documents apart: a query sees only keys of its own segment. Segment 0 is
    padding. None means one document.

    `block` [B, T] is the running sum of the `ar` column. A query sees every key whose block is not
    later. Attention is causal where ar is 1, and goes both ways where it is 0. None means causal.

    `common` [B, T] marks keys that all segments see, such as a text that several others continue.
    None means none.
    """

    window: int = 0
    segment: jax.Array | None = None
    block: jax.Array | None = None
    common: jax.Array | None = None


def make_mask(pattern: Pattern, length: int) -> jax.Array:
    """Writes the pattern as booleans [B or 1, T, T]: True where query t may look at key s."""
    query = jnp.arange(length)[:, None]
    key = jnp.arange(length)[None, :]

    if pattern.block is None:
        mask = (key <= query)[None]
    else:
        mask = pattern.block[:, None, :] <= pattern.block[:, :, None]
    if pattern.window:
        mask = mask & (query - key < pattern.window)[None]
    if pattern.segment is not None:
        near = pattern.segment[:, None, :] == pattern.segment[:, :, None]
        if pattern.common is not None:
            near = near | pattern.common[:, None, :]
        mask = mask & near & (pattern.segment != 0)[:, None, :]
    return mask
