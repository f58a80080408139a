"""Self-attention with every variant as data, and its KV cache (called by transformer).

Shapes: B batch, T query, S cache slots, D embed, N heads, K kv heads, H head_dim.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.attention import kernels, mask
from gpt_jax.model.attention.cache import _decode, fill
from gpt_jax.model.layers.embed import Embed
from gpt_jax.model.layers.extras import dropout
from gpt_jax.model.layers.linear import Weights, project
from gpt_jax.model.layers.norms import NORMS
from gpt_jax.model.layers.positions import rotate


class Context(NamedTuple):
    """What every layer of one forward pass shares. `angles`: cos and sin [B or 1, T, R / 2], or
    None; `lengths` [B]: tokens already in the cache before this pass (decode) or valid tokens of
    the prompt (prefill)."""

    tokens: jax.Array
    segment: jax.Array | None = None
    block: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    lengths: jax.Array | None = None


class QkNorm(nn.Module):
    """RMS norm over head_dim of [B, T, N, H] (Henry et al. 2020), scaled where the model's norm
    has a scale."""

    model: config.Model

    @nn.compact
    def __call__(self, x):
        x = NORMS["plain_rmsnorm"][0](x.astype(jnp.float32), self.model.norm_epsilon).astype(
            x.dtype
        )
        if self.model.norm != "plain_rmsnorm":
            scale = self.param(
                "scale", sharding.stored_init(nn.initializers.ones, ("scale",)), (x.shape[-1],)
            )
            x = (x * scale).astype(x.dtype)
        return x * jnp.asarray(self.model.qk_scale, x.dtype)


class Attention(nn.Module):
    """Causal self-attention [B, T, D] -> ([B, T, D], new cache).

    `cache` None: plain pass. A pair (k, v) [B, S, K, H]: a single token a row attends over the
    cache and itself, and its own k, v [B, 1, K, H] come back, for the caller to `append`; a
    longer input is a prompt that starts an empty cache, which comes back filled (Context.lengths
    tells its real tokens)."""

    model: config.Model
    compute: config.Compute
    window: int
    value_embed: bool

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        model = self.model
        B, T = x.shape[:2]
        bias = model.bias and model.qkv_bias

        axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
        counts = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
        flat = project(
            x,
            *(
                Weights(
                    counts[n] * model.head_dim,
                    ("embed", axes[n]),
                    "qkv",
                    model,
                    self.compute,
                    bias,
                    name=n,
                )
                for n in "qkv"
            ),
        )
        q, k, v = (
            sharding.reshape(
                y, (B, T, counts[n], model.head_dim), "batch", "seq", axes[n], "head_dim"
            )
            for n, y in zip("qkv", flat)
        )
        if self.value_embed:
            v = v + self._value_embedding(x, context.tokens)
        norm = [QkNorm(model, name=f"{n}_norm") for n in "qk"] if model.qk_norm else []
        if norm and not model.qk_norm_after_rope:
            q, k = norm[0](q), norm[1](k)
        if context.angles is not None:
            q, k = rotate(q, *context.angles), rotate(k, *context.angles)
        if norm and model.qk_norm_after_rope:
            q, k = norm[0](q), norm[1](k)

        if cache is not None and T == 1:
            y, cache = self._decode(q, k, v, cache, context.lengths), (k, v)
        else:
            pattern = mask.Pattern(self.window, context.segment, context.block)
            y = kernels.attention(
                self.compute.kernel, q, k, v, pattern, model.attention_softcap, self._keep(B, T)
            )
            if cache is not None:
                cache = [self._fill(x, context.lengths, cache[0].shape[1]) for x in (k, v)]
        y = sharding.reshape(y, (B, T, model.heads * model.head_dim), "batch", "seq", "heads")
        y = project(
            y,
            Weights(
                model.embed,
                ("heads", "embed"),
                "attention_out",
                model,
                self.compute,
                model.bias,
                name="out",
            ),
        )[0]
        return dropout(self, y, model.dropout), None if cache is None else tuple(cache)

    def _value_embedding(self, x, tokens):
        """Zhou et al. 2024's value residual as modded-nanogpt has it: a second embedding of the
        token, gated per head by 3 * sigmoid of a few channels of the stream, joins the values.
        [B, T, K, H]."""
        model = self.model
        width = model.kv_heads * model.head_dim
        embedded = Embed(model.vocab, width, "value_embed", model, name="value_embed")(
            tokens
        ).astype(x.dtype)
        embedded = sharding.reshape(
            embedded,
            (*tokens.shape, model.kv_heads, model.head_dim),
            "batch",
            "seq",
            None,
            "head_dim",
        )
        gate = Weights(
            model.kv_heads,
            ("gate", "kv_heads"),
            "gate",
            model,
            self.compute,
            False,
            name="value_gate",
        )
        strength = 3 * jax.nn.sigmoid(project(x[..., : model.value_embed_gate], gate)[0])
        return (
            sharding.constrain(embedded, "batch", "seq", "kv_heads", "head_dim")
            * strength[..., None]
        )

    def _keep(self, B, T):
        """Attention dropout as factors [B, N, T, T], or None."""
        rate = self.model.attention_dropout
        if rate == 0.0 or not self.has_rng("dropout"):
            return None
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (B, self.model.heads, T, T))
        return sharding.constrain(keep / (1 - rate), "batch", "heads", "seq", "keys")

    def _decode(self, q, k, v, cache, lengths):
        query, keys = (
            ("batch", "seq", "heads", "head_dim"),
            ("batch", "seq", "kv_heads", "head_dim"),
        )

        def run(*args):
            return _decode(*args, self.model.attention_softcap)

        return sharding.run_local(run, (query, keys, keys, keys, keys, ("batch",)), query)(
            q, k, v, *cache, lengths
        )

    def _fill(self, values, lengths, slots):
        keys = ("batch", "seq", "kv_heads", "head_dim")
        return sharding.run_local(lambda x, n: fill(x, n, slots), (keys, ("batch",)), keys)(
            values, lengths
        )
