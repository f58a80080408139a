"""One layer of the transformer: its two branches, their norms and their residuals."""

from typing import NamedTuple

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config
from gpt_jax.config import LayerSpec
from gpt_jax.model.attention.attention import Attention, Context
from gpt_jax.model.experts.moe import Moe
from gpt_jax.model.layers.dropout import dropout
from gpt_jax.model.layers.mlp import Mlp
from gpt_jax.model.layers.norms import Norm

MIXERS = {"attention": Attention}


class NormPlaces(NamedTuple):
    """Where a block is normalised: the input of a branch, its output, the sum after it."""

    input: bool
    output: bool
    sum: bool


NORM_PLACES = {
    "pre": NormPlaces(True, False, False),
    "post": NormPlaces(False, False, True),  # Vaswani et al. 2017
    "sandwich": NormPlaces(True, True, False),  # Gemma 2
    "branch": NormPlaces(False, True, False),  # OLMo 2
}


class Block(nn.Module):
    """One layer: a mixer and a feed-forward, each with its norms and residual.

    The norms are `mixer_norm` and `mlp_norm`, and `mixer_out_norm` and `mlp_out_norm` for the
    output of a branch.
    """

    model: config.Model
    compute: config.Compute
    spec: LayerSpec

    @nn.compact
    def __call__(self, x, x0, scalars, cache, context: Context):
        model = self.model
        spec = self.spec
        places = NORM_PLACES[model.norm_position]
        x = checkpoint_name(x, "layer_in")

        def norm(x, is_wanted, name):
            return Norm(model, name=name)(x) if is_wanted else x

        if scalars is not None:
            x = (scalars[0] * x + scalars[1] * x0).astype(x.dtype)

        mixer = MIXERS[spec.mixer](
            model, self.compute, spec.window, spec.value_embed, name=spec.mixer
        )
        y, cache = mixer(norm(x, places.input, "mixer_norm"), context, cache)
        y = norm(y, places.output, "mixer_out_norm")
        before = x
        x = norm(x + y, places.sum, "mixer_norm")

        inner = norm(before if model.parallel else x, places.input, "mlp_norm")
        if spec.ffn == "moe":
            y, stats = Moe(model, self.compute, name="mlp")(inner, context.segment)
        else:
            y = Mlp(spec.ffn, model, self.compute, name="mlp")(inner)
            stats = {}
        y = norm(y, places.output, "mlp_out_norm")
        x = norm(x + dropout(self, y, model.dropout), places.sum, "mlp_norm")

        self.sow("intermediates", "residual", x)
        return x, cache, stats
