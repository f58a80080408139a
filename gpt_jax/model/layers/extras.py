"""Small parts of the residual stream: soft-caps, learned scalars and smear.

Shapes: B batch, T sequence, D embed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.layers.linear import Weights, project
from gpt_jax.model.parametrization import residual_ramp


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squeezes x into (-cap, cap) by cap * tanh(x / cap) (Gemma 2). A cap of 0 returns x."""
    if cap == 0.0:
        return x
    return cap * jnp.tanh(x / cap)


def add_scaled(x: jax.Array, scale: jax.Array, y: jax.Array) -> jax.Array:
    """x + scale * y in the dtype of x, where the learned scale [1] is not rounded to that dtype."""
    return (x.astype(jnp.float32) + scale * y.astype(jnp.float32)).astype(x.dtype)


class ResidualScalars(nn.Module):
    """Two vectors [layers]: at every layer a factor of the stream and one of the embedding."""

    layers: int

    @nn.compact
    def __call__(self):
        def make(name, first, last):
            init = sharding.stored_init(residual_ramp(first, last), ("layers",))
            return self.param(name, init, (self.layers,))

        return make("x", 1.15, 1.05), make("x0", 0.20, 0.05)


class Factor(nn.Module):
    """One learned number [1] that starts at `start`."""

    start: float

    @nn.compact
    def __call__(self):
        init = sharding.stored_init(nn.initializers.constant(self.start), ("scale",))
        return self.param("scale", init, (1,))


class Smear(nn.Module):
    """Adds to each token a gated share of the token `before` it, both [B, T, D].

    The idea comes from modded-nanogpt and nanochat.
    """

    model: config.Model
    compute: config.Compute

    @nn.compact
    def __call__(self, x, before):
        weights = Weights(1, ("gate", None), "gate", self.model, self.compute, False, name="gate")
        gate = jax.nn.sigmoid(project(x[..., : self.model.smear_gate], weights)[0])
        scale = Factor(0.0, name="factor")()
        return add_scaled(x, scale, gate * before)
