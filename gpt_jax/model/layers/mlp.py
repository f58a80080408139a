"""The dense feed-forward, with its activations as rows of a table.

Shapes: B batch, T sequence, D embed, F mlp.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config
from gpt_jax.model.layers.linear import Weights, project


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _relu2(x):
    return jnp.square(jax.nn.relu(x))


# name -> (activation, has a gate)
FFNS = {
    "relu": (jax.nn.relu, False),
    "gelu": (_gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu2": (_relu2, False),  # So et al. 2021
    "swiglu": (jax.nn.silu, True),  # Shazeer 2020
    "geglu": (_gelu_tanh, True),  # Shazeer 2020
}


class Mlp(nn.Module):
    """The feed-forward [B, T, D] -> [B, T, D] of the row `ffn` in FFNS."""

    ffn: str
    model: config.Model
    compute: config.Compute

    @nn.compact
    def __call__(self, x):
        model = self.model
        activation, is_gated = FFNS[self.ffn]
        has_bias = config.has_bias(model, "mlp")

        def linear(features, axes, role, name):
            return Weights(features, axes, role, model, self.compute, has_bias, name=name)

        names = ("up", "gate") if is_gated else ("up",)
        maps = [linear(model.mlp, ("embed", "mlp"), "mlp_in", name) for name in names]
        up, *gate = (checkpoint_name(y, "mlp_in") for y in project(x, *maps))
        hidden = activation(gate[0]) * up if is_gated else activation(up)
        hidden = checkpoint_name(hidden, "mlp_hidden")

        down = linear(model.embed, ("mlp", "embed"), "mlp_out", "down")
        return checkpoint_name(project(hidden, down)[0], "mlp_out")
