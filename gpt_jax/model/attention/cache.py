"""The KV cache, and one decoding step over it.

Shapes: B batch, T query, S cache slots, K kv heads, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp

from gpt_jax.model.attention.attend import scale_queries
from gpt_jax.model.layers.extras import softcap


def cache_slots(window: int, max_seq: int) -> int:
    """Returns the number of slots that a layer's cache needs.

    A windowed layer needs no more than its window, because it never looks further back.
    """
    return min(window, max_seq) if window else max_seq


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
    """Returns the position of the token in each slot [B, S] after `lengths` [B] tokens.

    The slots form a ring. A negative position means that the slot is empty.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)[None]) % slots


def fill(values: jax.Array, lengths: jax.Array, slots: int) -> jax.Array:
    """Makes the cache [B, S, K, H] of a prompt's keys or values [B, T, K, H].

    The first `lengths` [B] of them are real.
    """
    position = slot_positions(lengths, slots)
    index = jnp.clip(position, 0, values.shape[1] - 1)[..., None, None]
    in_slots = jnp.take_along_axis(values, index, axis=1)
    return jnp.where((position >= 0)[..., None, None], in_slots, 0)


def append(cached: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """Puts one new token a row into a stack of caches [layers, B, S, K, H].

    `new` are the token's keys or values [layers, B, 1, K, H]. The caller appends once a step,
    after all layers have read. The write is in place when the cache is donated.
    """
    return cached.at[:, jnp.arange(lengths.shape[0]), lengths % cached.shape[2]].set(new[:, :, 0])


def decode_token(q, k, v, cached_k, cached_v, lengths, cap):
    """Lets one new token a row attend over the cache and itself -> [B, 1, N, H].

    q is [B, 1, N, H], k and v are [B, 1, K, H]. The caches are those before the token is written.
    The two blocks of scores share one softmax, so that no layer copies its cache.
    """
    B, _, N, H = q.shape
    slots, K = cached_k.shape[1:3]
    q = scale_queries(q).reshape(B, K, N // K, H)

    def score(keys):
        return jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)

    scores = softcap(jnp.concatenate([score(cached_k), score(k)], -1), cap)

    # The slot that the new token will take is never seen. It is empty, or its token has just left
    # the window.
    position = slot_positions(lengths, slots)
    is_seen = (position >= 0) & (position > lengths[:, None] - slots)
    is_seen = jnp.pad(is_seen, ((0, 0), (0, 1)), constant_values=True)
    scores = jnp.where(is_seen[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)

    def mix(probs, values):
        return jnp.einsum("bkgs,bskh->bkgh", probs, values)

    out = mix(probs[..., :slots], cached_v) + mix(probs[..., slots:], v)
    return out.reshape(B, 1, N, H)
