"""Which keys a query may see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pattern(NamedTuple):
    """Who may look at whom. `segment` [B, T]: only the same, 0 is padding; `block` [B, T]: the
    running sum of the `ar` column (a query sees every key whose block is not later: causal where
    ar is 1, both ways where it is 0); None of them: one document, causal. `window`: keys within
    reach, the query's own included; 0: all."""

    window: int = 0
    segment: jax.Array | None = None
    block: jax.Array | None = None


def make_mask(pattern: Pattern, length: int) -> jax.Array:
    """The pattern as booleans [B or 1, T, T], True where query t may look at key s."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    if pattern.block is None:
        mask = (key <= query)[None]
    else:
        mask = pattern.block[:, None, :] <= pattern.block[:, :, None]
    if pattern.window:
        mask = mask & (query - key < pattern.window)[None]
    if pattern.segment is not None:
        same = pattern.segment[:, None, :] == pattern.segment[:, :, None]
        mask = mask & same & (pattern.segment != 0)[:, None, :]
    return mask
