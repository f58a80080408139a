"""Normalisation layers, as rows of a table."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding


def _layernorm(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


def _rmsnorm(x, epsilon):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


# name -> (function in float32, has a scale, has a bias)
NORMS = {
    "layernorm": (_layernorm, True, True),  # Ba et al. 2016
    "rmsnorm": (_rmsnorm, True, False),  # Zhang & Sennrich 2019
    "plain_rmsnorm": (_rmsnorm, False, False),
}


class Norm(nn.Module):
    """Normalises the last dim in float32 and returns the input's dtype."""

    model: config.Model

    @nn.compact
    def __call__(self, x):
        function, has_scale, has_bias = NORMS[self.model.norm]
        y = function(x.astype(jnp.float32), self.model.norm_epsilon)

        if has_scale:
            ones = sharding.stored_init(nn.initializers.ones, ("scale",))
            y = y * self.param("scale", ones, (x.shape[-1],))
        if has_bias and self.model.bias:
            zeros = sharding.stored_init(nn.initializers.zeros, ("scale",))
            y = y + self.param("bias", zeros, (x.shape[-1],))

        return y.astype(x.dtype)
