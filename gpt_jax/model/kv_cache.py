"""The KV cache of all layers: an empty one, and one token more."""

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.config import layer_specs, layout
from gpt_jax.errors import UsageError
from gpt_jax.model.attention.cache import append, cache_slots


def make_cache(model: config.Model, compute: config.Compute, rows: int, length: int) -> dict:
    """Makes an empty KV cache for `rows` sequences of up to `length` tokens.

    A layer has a pair (k, v), each [rows, slots, kv_heads, head_dim]. Under `blocks` they are
    stacked over repeats. A model with `smear` has `previous` [rows, D] too.

    Raises UsageError if `length` exceeds the table of learned positions.
    """
    if length > model.max_seq and model.position == "learned":
        raise UsageError(f"{length} tokens do not fit the model's context of {model.max_seq}")
    plan = layout(layer_specs(model))
    dtype = jnp.dtype(compute.dtype)

    def make_zeros(shape):
        axes = ("batch", "seq", "kv_heads", "head_dim")
        lead = [None] * (len(shape) - len(axes))
        return sharding.constrain(jnp.zeros(shape, dtype), *lead, *axes)

    def make_layer(spec, *lead):
        slots = cache_slots(spec.window, length)
        shape = (*lead, rows, slots, model.kv_heads, model.head_dim)
        return make_zeros(shape), make_zeros(shape)

    blocks = {str(i): make_layer(spec, plan.repeats) for i, spec in enumerate(plan.period)}
    tail = {str(i): make_layer(spec) for i, spec in enumerate(plan.tail)}
    cache = {"blocks": blocks, "tail": tail or None}
    if model.smear:
        previous = jnp.zeros((rows, model.embed), dtype)
        cache["previous"] = sharding.constrain(previous, "batch", None)
    return cache


def append_token(cache: dict, new: dict, lengths: jax.Array) -> dict:
    """Puts the keys and values of one new token a row into the cache."""
    keys = (None, "batch", "seq", "kv_heads", "head_dim")
    put = sharding.run_local(append, (keys, keys, ("batch",)), keys)

    def put_stack(old, x):
        return put(old, x, lengths)

    def put_layer(old, x):
        return put(old[None], x[None], lengths)[0]

    return new | {
        "blocks": jax.tree.map(put_stack, cache["blocks"], new["blocks"]),
        "tail": jax.tree.map(put_layer, cache["tail"], new["tail"]),
    }
