"""Normalisation layers, as rows of a table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding


def _layernorm(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


def rmsnorm(x: jax.Array, epsilon: float, dims: Sequence[int] = (-1,)) -> jax.Array:
    """Divides x by its root mean square over `dims`."""
    return x * jax.lax.rsqrt((x * x).mean(dims, keepdims=True) + epsilon)


class Kind(NamedTuple):
    """A kind of normalisation. `function` runs in float32.

    The result is multiplied with `offset` + scale, where the kind has a scale. So a scale starts
    at 1 - `offset`.
    """

    function: Callable[[jax.Array, float], jax.Array]
    has_scale: bool
    has_bias: bool
    offset: float = 0.0


NORMS = {
    "layernorm": Kind(_layernorm, True, True),  # Ba et al. 2016
    "rmsnorm": Kind(rmsnorm, True, False),  # Zhang & Sennrich 2019
    "plain_rmsnorm": Kind(rmsnorm, False, False),
    "unit_rmsnorm": Kind(rmsnorm, True, False, offset=1.0),  # Gemma
}


def scale_param(module: nn.Module, kind: Kind, width: int) -> jax.Array:
    """The factors [width] of a norm, from the parameter `scale` of `module`, in float32."""
    start = nn.initializers.constant(1 - kind.offset)
    init = sharding.stored_init(start, ("scale",))
    return kind.offset + module.param("scale", init, (width,))


class Norm(nn.Module):
    """Normalises the last dim in float32 and returns the input's dtype."""

    model: config.Model

    @nn.compact
    def __call__(self, x):
        kind = NORMS[self.model.norm]
        y = kind.function(x.astype(jnp.float32), self.model.norm_epsilon)

        if kind.has_scale:
            y = y * scale_param(self, kind, x.shape[-1])
        if kind.has_bias and self.model.bias:
            zeros = sharding.stored_init(nn.initializers.zeros, ("scale",))
            y = y + self.param("bias", zeros, (x.shape[-1],))

        return y.astype(x.dtype)
