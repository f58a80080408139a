"""Pallas splash attention for TPU: skips the blocks of keys that causal order and windows rule out
(called by kernels).

Shapes: B batch, T tokens of a row, N heads, K kv heads, H head_dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import sharding
from gpt_jax.model.attention import ring

# as MaxText has them; the library's own default of 128 takes 16 times the entries in its tables
BLOCK = 512


def attention(q, k, v, pattern, cap: float = 0.0, axis: str | None = None, interpret: bool = False):
    """q [B, t, N, H] over k, v [B, t, K, H] -> [B, t, N, H], without `ar` blocks; t is a
    multiple of 128. With `axis` rows are cut over that mesh axis (t = T / pieces) and the keys
    of whole rows are gathered first. In padding the result is arbitrary, and finite."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        splash_attention_kernel as splash,
        splash_attention_mask as masks,
    )

    t, N, H = q.shape[1:]
    pieces = jax.lax.axis_size(axis) if axis else 1
    T, size = t * pieces, math.gcd(t, BLOCK)
    mask = (
        masks.LocalMask((T, T), (pattern.window - 1, 0), 0)
        if pattern.window
        else masks.CausalMask((T, T))
    )
    if axis:
        mask.q_sequence = sharding.token_order(T, pieces).astype(
            np.int32
        )  # row -> token, here and inside the kernel
    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=pieces,
        block_sizes=BlockSizes(*(size,) * 8),
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )
    whole = (lambda x: ring.gather(x, axis)) if axis else lambda x: x
    # its tables by blocks of queries, [1, c * …, …], and the tokens of the queries, [T]: this
    # device's part
    if axis:
        me = jax.lax.axis_index(axis)

        def part(x, dim):
            return jax.lax.dynamic_slice_in_dim(
                x, me * (x.shape[dim] // pieces), x.shape[dim] // pieces, dim
            )

        kernel = jax.tree.map(lambda x: part(x, x.ndim // 2), kernel)
    segment = pattern.segment
    ids = None if segment is None else splash.SegmentIds(q=segment, kv=whole(segment))

    def heads_first(x):
        return x.swapaxes(1, 2)

    q, k, v = (heads_first(x) for x in (q * jnp.asarray(H**-0.5, q.dtype), whole(k), whole(v)))
    run = jax.vmap(
        lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids),
        in_axes=(0, 0, 0, None if ids is None else 0),
    )
    return heads_first(run(q, k, v, ids))
