"""Softmax attention with an explicit mask: what every kernel computes, written plainly.

Shapes: B batch, T query, S key, N heads, K kv heads, G = N / K, H head_dim.
"""

import jax
import jax.numpy as jnp

from gpt_jax.model.layers.extras import softcap
from gpt_jax.model.layers.linear import widen


def attend(q, k, v, mask, cap: float = 0.0, keep=None):
    """Softmax attention with an explicit mask, scores and softmax in float32.

    q is [B, T, N, H], k and v are [B, S, K, H], and the mask is [B or 1, T, S]. The result is
    [B, T, N, H]. `keep` [B, N, T, S] multiplies the probabilities (dropout).

    A query that may look at nothing gets the mean of v. Its weight in the loss must be 0.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K

    q, k = heads_first(q, k)
    v = jnp.swapaxes(v, 1, 2)
    probs = weigh(q, k, mask, cap)
    if keep is not None:
        probs = probs * keep.reshape(B, K, G, T, S)

    out = jnp.einsum("bkts,bksh->bkth", probs.astype(v.dtype).reshape(B, K, G * T, S), v)
    return jnp.moveaxis(out.reshape(B, K, G, T, H), 3, 1).reshape(B, T, N, H)


def attend_after_text(q, k, v, mask, text_k, text_v, before, cap: float = 0.0):
    """`attend` of rows that all continue one text, whose keys and values they share.

    text_k and text_v are [S, K, H], and the first `before` of them are real. The mask
    [B or 1, T, T] is for the rows' own keys. The two blocks of scores share one softmax, so that no
    row has a copy of the text.
    """
    B, T, N, H = q.shape
    S, K = text_k.shape[:2]
    q, k = heads_first(q, k)

    text_scores = jnp.einsum("bkth,skh->bkts", q, text_k, preferred_element_type=jnp.float32)
    own_scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.concatenate([text_scores, own_scores], -1)
    scores = softcap(scores, cap).reshape(B, K, N // K, T, S + T)
    is_text = jnp.broadcast_to(jnp.arange(S) < before, (*mask.shape[:2], S))
    is_seen = jnp.concatenate([is_text, mask], -1)[:, None, None]
    scores = jnp.where(is_seen, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, -1, S + T)

    out = jnp.einsum("bkts,skh->bkth", probs[..., :S], text_v)
    out = out + jnp.einsum("bkts,bskh->bkth", probs[..., S:], v)
    return jnp.moveaxis(out.reshape(B, K, N // K, T, H), 3, 1).reshape(B, T, N, H)


def scale_queries(q):
    """Queries [..., H] times H^-0.5, rounded once to their dtype.

    In bfloat16 the factor itself would be off by up to 0.2 %, unless H is a power of 4.
    """
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def heads_first(q, k):
    """Scaled queries [B, K, G T, H] and keys [B, K, S, H].

    Heads come first, and the queries of a group are stacked on those of its kv head. This makes one
    plain batched matmul over [B, K]. XLA's CPU backend runs it a quarter faster than the
    contraction with heads inside.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = scale_queries(q)
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, N // K * T, H)
    return q, jnp.swapaxes(k, 1, 2)


def weigh(q, k, mask, cap: float):
    """The probabilities [B, K, G, T, S] of what `heads_first` gives, before dropout."""
    B, K, S = k.shape[:3]
    T = mask.shape[1]

    def multiply(q, k, dtype):
        return jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=dtype)

    scores = softcap(widen(multiply, q, k), cap)
    scores = scores.reshape(B, K, -1, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)
