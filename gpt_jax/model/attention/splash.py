"""Pallas splash attention for TPU.

It skips the blocks of keys that causal order and windows rule out.

Shapes: B batch, T tokens of a row, t = T / pieces of them on one device, N heads, K kv heads,
H head_dim.
"""

import math

import jax
import numpy as np

from gpt_jax import sharding
from gpt_jax.model.attention import ring
from gpt_jax.model.attention.attend import scale_queries

# This is MaxText's size. The library's own default of 128 takes 16 times the entries in its tables.
BLOCK = 512
RESULT = "splash_result"  # the name of output and softmax sums for `jax.checkpoint`


def attention(q, k, v, pattern, cap: float = 0.0, axis: str | None = None, interpret: bool = False):
    """Lets q [B, t, N, H] attend over k and v [B, t, K, H] -> [B, t, N, H].

    t must be a multiple of 128. `ar` blocks are not supported. In padding the result is arbitrary,
    and finite.

    With `axis` rows are cut over that mesh axis. The keys of whole rows are gathered first.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kernel = _make_kernel(q.shape, pattern.window, cap, axis, interpret)

    def gather(x):
        return ring.gather(x, axis) if axis else x

    ids = None
    if pattern.segment is not None:
        ids = splash.SegmentIds(q=pattern.segment, kv=gather(pattern.segment))

    def put_heads_first(x):
        return x.swapaxes(1, 2)

    def run_row(q, k, v, ids):
        return kernel(q, k, v, segment_ids=ids)

    k = gather(k)
    v = gather(v)
    q, k, v = (put_heads_first(x) for x in (scale_queries(q), k, v))
    run = jax.vmap(run_row, in_axes=(0, 0, 0, None if ids is None else 0))
    return put_heads_first(run(q, k, v, ids))


def _make_kernel(q_shape, window: int, cap: float, axis: str | None, interpret: bool):
    """Makes the library's kernel for q [B, t, N, H], with this device's part of its tables."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        splash_attention_kernel as splash,
        splash_attention_mask as masks,
    )

    t, N, _ = q_shape[1:]
    pieces = jax.lax.axis_size(axis) if axis else 1
    T = t * pieces
    size = math.gcd(t, BLOCK)

    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    if axis:
        # Row i of the mask belongs to this token of the text, here and inside the kernel.
        mask.q_sequence = sharding.token_order(T, pieces).astype(np.int32)

    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=pieces,
        block_sizes=BlockSizes(
            block_q=size,
            block_kv=size,
            block_kv_compute=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        attn_logits_soft_cap=cap or None,
        residual_checkpoint_name=RESULT,
        interpret=interpret,
    )
    if not axis:
        return kernel

    me = jax.lax.axis_index(axis)

    def take_own_part(table):
        # Tables by blocks of queries are [1, c * …, …], and the tokens of the queries are [T].
        # The dim of the queries is in the middle of both.
        dim = table.ndim // 2
        part = table.shape[dim] // pieces
        return jax.lax.dynamic_slice_in_dim(table, me * part, part, dim)

    return jax.tree.map(take_own_part, kernel)
