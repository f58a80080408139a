"""The programs of flash attention: what one block of queries or keys computes on a GPU.

Scores live in registers, for a block of queries by a block of keys at a time (FlashAttention-2, Dao
2023, arXiv:2307.08691). Pallas hands these functions references to arrays in memory, and Triton
compiles them. Each visits only blocks within bounds that `flash.list_bounds` gives.

Shapes: T tokens of a row, Q tokens of a block of queries, S of a block of keys, G query heads of
a kv head, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt_jax.model.layers.extras import softcap

# It is finite, because the difference of two infinities is no number.
NEVER = -1e30


class Setting(NamedTuple):
    """What is the same for every block. `window` 0 and `cap` 0 mean none."""

    window: int
    cap: float
    interpret: bool


class Blocks(NamedTuple):
    """Tokens of a block of queries and of keys, and the warps of a program."""

    queries: int
    keys: int
    warps: int


def forward(first_ref, q_ref, k_ref, v_ref, segment_ref, out_ref, sums_ref, setting, blocks):
    """Output [Q, H] of a block of queries, and the logarithms [Q] of its softmax's sums."""
    i = pl.program_id(0)
    Q, S = blocks.queries, blocks.keys
    q = q_ref[...]
    query = _place(i, Q)[:, None]
    query_ids = _read_ids(segment_ref, i, Q)

    def visit(j, carry):
        out, largest, total = carry
        keys = pl.ds(j * S, S)
        scores = softcap(_compare(q, k_ref[keys, :]), setting.cap)
        key_ids = _read_ids(segment_ref, j, S)
        scores = _hide(
            scores, setting, query, _place(j, S)[None], _column(query_ids), _row(key_ids)
        )

        # A row that has seen no key yet counts hidden ones. Its first key takes that back exactly,
        # because exp(NEVER - score) is 0, and its own key comes last.
        new_largest = jnp.maximum(largest, scores.max(1))
        shrink = jnp.exp(largest - new_largest)
        weights = jnp.exp(scores - new_largest[:, None])
        v = v_ref[keys, :]
        out = out * shrink[:, None] + _multiply(weights.astype(v.dtype), v)
        return out, new_largest, total * shrink + weights.sum(1)

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((Q,), -jnp.inf, jnp.float32),
        jnp.zeros((Q,), jnp.float32),
    )
    out, largest, total = jax.lax.fori_loop(first_ref[...], _end_keys(i, Q, S), visit, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    sums_ref[...] = largest + jnp.log(total)


def backward_queries(
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    segment_ref,
    pull_ref,
    sums_ref,
    delta_ref,
    d_q_ref,
    setting,
    blocks,
):
    """The gradient [Q, H] of a block of queries. `pull` is that of the output.

    `delta` [Q] is the sum of pull times output over H.
    """
    i = pl.program_id(0)
    Q, S = blocks.queries, blocks.keys
    q = q_ref[...]
    pull = pull_ref[...]
    sums = sums_ref[...][:, None]
    delta = delta_ref[...][:, None]
    query = _place(i, Q)[:, None]
    query_ids = _read_ids(segment_ref, i, Q)

    def visit(j, d_q):
        keys = pl.ds(j * S, S)
        k = k_ref[keys, :]
        capped = softcap(_compare(q, k), setting.cap)
        key_ids = _read_ids(segment_ref, j, S)
        scores = _hide(
            capped, setting, query, _place(j, S)[None], _column(query_ids), _row(key_ids)
        )

        weights = jnp.exp(scores - sums)
        d_weights = _compare(pull, v_ref[keys, :])
        d_scores = weights * (d_weights - delta) * _cap_slope(capped, setting.cap)
        return d_q + _multiply(d_scores.astype(k.dtype), k)

    start = jnp.zeros(q.shape, jnp.float32)
    d_q = jax.lax.fori_loop(first_ref[...], _end_keys(i, Q, S), visit, start)
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def backward_keys(
    end_ref,
    q_ref,
    k_ref,
    v_ref,
    segment_ref,
    pull_ref,
    sums_ref,
    delta_ref,
    d_k_ref,
    d_v_ref,
    setting,
    blocks,
):
    """The gradients [S, H] of a block of keys and values, summed over the G heads that read them.

    Scores are [S, Q] here, so that no weights have to be transposed.
    """
    j = pl.program_id(0)
    Q, S = blocks.queries, blocks.keys
    k = k_ref[...]
    v = v_ref[...]
    key = _place(j, S)[:, None]
    key_ids = _read_ids(segment_ref, j, S)

    def visit_head(head, carry):
        def visit(i, carry):
            d_k, d_v = carry
            queries = pl.ds(i * Q, Q)
            q = q_ref[queries, head, :]
            pull = pull_ref[queries, head, :]
            capped = softcap(_compare(k, q), setting.cap)
            query_ids = _read_ids(segment_ref, i, Q)
            scores = _hide(
                capped, setting, _place(i, Q)[None], key, _row(query_ids), _column(key_ids)
            )
            weights = jnp.exp(scores - sums_ref[head, queries][None])
            d_v += _multiply(weights.astype(pull.dtype), pull)
            d_weights = _compare(v, pull)
            d_scores = weights * (d_weights - delta_ref[head, queries][None])
            d_scores *= _cap_slope(capped, setting.cap)
            return d_k + _multiply(d_scores.astype(q.dtype), q), d_v

        # Causal order hides the keys from queries before them.
        return jax.lax.fori_loop(j * S // Q, end_ref[...], visit, carry)

    start = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, q_ref.shape[1], visit_head, (start, start))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _compare(left, right):
    """Dot products [X, Y] in float32 of all rows of left [X, H] and right [Y, H]."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _multiply(left, right):
    """The product of matrices in float32."""
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _end_keys(i, Q: int, S: int):
    """The number of blocks of keys up to the last query of block i."""
    return jax.lax.div((i + 1) * Q + S - 1, S)


def _place(block, size: int):
    """The places in the row of a block's tokens."""
    return block * size + jnp.arange(size)


def _read_ids(segment_ref, block, size: int):
    """The documents of a block's tokens. None if the row is one document."""
    return None if segment_ref is None else segment_ref[pl.ds(block * size, size)]


def _column(ids):
    return None if ids is None else ids[:, None]


def _row(ids):
    return None if ids is None else ids[None]


def _hide(scores, setting: Setting, query, key, query_ids, key_ids):
    """Scores, NEVER where the query may not see the key.

    Places and documents are [Q, 1] and [1, S], or [1, Q] and [S, 1].
    """
    mask = key <= query
    if setting.window:
        mask &= query - key < setting.window
    if query_ids is not None:
        mask &= query_ids == key_ids
    return jnp.where(mask, scores, NEVER)


def _cap_slope(capped, cap: float):
    """The derivative of the soft-cap where it gives `capped`."""
    return 1.0 - jnp.square(capped / cap) if cap else 1.0
