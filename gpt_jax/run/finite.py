"""Weights on devices that are NaN or infinite."""

import jax
import jax.numpy as jnp

from gpt_jax import sharding
from gpt_jax.interop import describe_nonfinite


def find_nonfinite(params) -> str:
    """One line with the parameters that hold NaN or infinity, or "".

    Devices count their own shards. Every process calls it, and gets the same answer.
    """

    def count(params):
        # float32, because a count of int32 ends at 2e9. It is exact up to 16 million.
        return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.float32), params)

    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(jax.jit(count)(params)))
    counts = {sharding.join_path(keys): int(leaf) for keys, leaf in leaves if leaf}
    return describe_nonfinite(counts)
