"""The KV cache, and one decoding step over it.

Shapes: B batch, T query, S cache slots, K kv heads, N heads, H head_dim.
"""

import jax
import jax.numpy as jnp

from gpt_jax.model.layers.extras import softcap


def cache_slots(window: int, max_seq: int) -> int:
    """Slots a layer's cache needs: a windowed layer never looks further back than its window."""
    return min(window, max_seq) if window else max_seq


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
    """Position held by each slot of a ring of `slots` after `lengths` [B] tokens -> [B, S];
    negative: nothing yet."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)[None]) % slots


def fill(values: jax.Array, lengths: jax.Array, slots: int) -> jax.Array:
    """The cache [B, S, K, H] after a prompt's keys or values [B, T, K, H] of which the first
    `lengths` [B] are real."""
    position = slot_positions(lengths, slots)
    found = jnp.take_along_axis(
        values, jnp.clip(position, 0, values.shape[1] - 1)[..., None, None], axis=1
    )
    return jnp.where((position >= 0)[..., None, None], found, 0)


def append(cached: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """A stack of caches [layers, B, S, K, H] with the keys or values [layers, B, 1, K, H] of one
    new token a row in their slots. Called once a step, after all layers have read: in place when
    the cache is donated."""
    return cached.at[:, jnp.arange(lengths.shape[0]), lengths % cached.shape[2]].set(new[:, :, 0])


def _decode(q, k, v, cached_k, cached_v, lengths, cap):
    """One new token a row, q [B, 1, N, H], attends over itself, k and v [B, 1, K, H], and the
    cache before it is written: two score blocks under one softmax, so that no layer copies its
    cache."""
    B, _, N, H = q.shape
    slots, K = cached_k.shape[1:3]
    q = q.reshape(B, K, N // K, H) * jnp.asarray(H**-0.5, q.dtype)

    def score(keys):
        return jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)

    scores = softcap(jnp.concatenate([score(cached_k), score(k)], -1), cap)
    position = slot_positions(lengths, slots)
    # The slot that the new token will take holds nothing yet, or what the window now leaves behind.
    seen = (position >= 0) & (position > lengths[:, None] - slots)
    scores = jnp.where(
        jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None, None], scores, -jnp.inf
    )
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)

    def mix(probs, values):
        return jnp.einsum("bkgs,bskh->bkgh", probs, values)

    return (mix(probs[..., :slots], cached_v) + mix(probs[..., slots:], v)).reshape(B, 1, N, H)
