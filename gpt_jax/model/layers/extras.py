"""Small parts of the residual stream: dropout, soft-caps, learned scalars and smear."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.layers.linear import Weights, project
from gpt_jax.model.parametrization import residual_ramp


def dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """x [B, T, D] with entries dropped at `rate`, only when the caller passed a "dropout" key to
    `apply`."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    keep = sharding.reorder(jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape))
    return jnp.where(sharding.lay_out_like(keep, x), x / (1 - rate), 0).astype(x.dtype)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap) (Gemma 2); cap 0: x."""
    return x if cap == 0.0 else cap * jnp.tanh(x / cap)


class ResidualScalars(nn.Module):
    """Factors of the stream and of the embedding at every layer: two [layers] vectors."""

    layers: int

    @nn.compact
    def __call__(self):
        def make(name, *ends):
            return self.param(
                name, sharding.stored_init(residual_ramp(*ends), ("layers",)), (self.layers,)
            )

        return make("x", 1.15, 1.05), make("x0", 0.20, 0.05)


class Factor(nn.Module):
    """One learned number [1], from `start`."""

    start: float

    @nn.compact
    def __call__(self):
        return self.param(
            "scale", sharding.stored_init(nn.initializers.constant(self.start), ("scale",)), (1,)
        )


class Smear(nn.Module):
    """A gated share of the token `before` joins each token, both [B, T, D] (modded-nanogpt,
    nanochat)."""

    model: config.Model
    compute: config.Compute

    @nn.compact
    def __call__(self, x, before):
        weights = Weights(1, ("gate", None), "gate", self.model, self.compute, False, name="gate")
        gate = jax.nn.sigmoid(project(x[..., : self.model.smear_gate], weights)[0])
        scale = Factor(0.0, name="factor")().astype(x.dtype)
        return x + scale * gate * before
