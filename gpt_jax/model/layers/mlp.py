"""The dense feed-forward, with its activations as rows of a table."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config
from gpt_jax.model.layers.linear import Weights, project

# name -> (activation, has a gate)
FFNS = {
    "relu": (jax.nn.relu, False),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), False),
    "gelu_tanh": (lambda x: jax.nn.gelu(x, approximate=True), False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),  # So et al. 2021
    "swiglu": (jax.nn.silu, True),  # Shazeer 2020
    "geglu": (lambda x: jax.nn.gelu(x, approximate=True), True),
}


class Mlp(nn.Module):
    """The feed-forward [B, T, D] -> [B, T, D] of table row `name`."""

    name_of_row: str
    model: config.Model
    compute: config.Compute

    @nn.compact
    def __call__(self, x):
        model = self.model
        activation, gated = FFNS[self.name_of_row]

        def linear(features, axes, role, name):
            return Weights(features, axes, role, model, self.compute, model.bias, name=name)

        names = ("up", "gate") if gated else ("up",)
        up, *gate = project(
            x, *(linear(model.mlp, ("embed", "mlp"), "mlp_in", name) for name in names)
        )
        hidden = activation(gate[0]) * up if gated else activation(up)
        return project(hidden, linear(model.embed, ("mlp", "embed"), "mlp_out", "down"))[0]
