"""How likely given text is, token by token (called by benchmark adapters).

Shapes: B rows, T tokens, V rows of the embedding.
"""

from typing import Callable

import jax
import jax.numpy as jnp

from gpt_jax import sharding


def token_logprobs(forward: Callable, params, batch: dict) -> jax.Array:
    """Log-probabilities (nats) [B, T], float32, of `batch["targets"]` by `forward(params, batch)` -> logits [B, T, V].

    The target's logit is found by comparing with an iota: a gather would need the whole vocabulary on each device."""
    logits = forward(params, batch).astype(jnp.float32)
    vocab = sharding.constrain(jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2), None, None, "vocab")
    at_target = jnp.where(vocab == batch["targets"][..., None], logits, 0.0).sum(-1)
    return at_target - jax.nn.logsumexp(logits, axis=-1)
