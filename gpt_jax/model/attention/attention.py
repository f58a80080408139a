"""The self-attention layer, every variant of it as data.

Shapes: B batch, T query, S cache slots, D embed, N heads, K kv heads, H head_dim, R rotating
channels.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import config, sharding
from gpt_jax.model.attention import kernels, mask
from gpt_jax.model.attention.attend import attend_after_text
from gpt_jax.model.attention.cache import decode_token, fill
from gpt_jax.model.layers.dropout import dropout
from gpt_jax.model.layers.embed import Embed
from gpt_jax.model.layers.linear import Weights, project
from gpt_jax.model.layers.norms import NORMS, rmsnorm, scale_param
from gpt_jax.model.layers.positions import rotate

# The logical axes of queries, and of keys and values.
QUERY_AXES = ("batch", "seq", "heads", "head_dim")
KEY_AXES = ("batch", "seq", "kv_heads", "head_dim")
# The collection of Flax that attention maps are kept in, if somebody asks for it (model/taps.py).
MAPS = "attention_maps"


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    `angles` are cos and sin [B or 1, T, R / 2] of rotary positions, or None. `local_angles` are
    those of layers with a window, where these rotate by another base, and else None. `common`
    [B, T] marks the tokens that all segments see, or is None.

    `lengths` [B] belongs to a pass with a cache. When a prompt starts the cache, it counts the
    valid tokens of the prompt. In a decoding step it counts the tokens already in the cache.

    `before` [rows of the cache] belongs to rows that all continue one text, whose keys and values
    are the cache. It counts the tokens of that text.
    """

    tokens: jax.Array
    segment: jax.Array | None = None
    block: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    lengths: jax.Array | None = None
    local_angles: tuple[jax.Array, jax.Array] | None = None
    common: jax.Array | None = None
    before: jax.Array | None = None


class QkNorm(nn.Module):
    """RMS norm of queries or keys [B, T, N, H] over the head (Henry et al. 2020) or all heads.

    It has a learned scale where the model's norm has one.
    """

    model: config.Model

    @nn.compact
    def __call__(self, x):
        kind = NORMS[self.model.norm]
        dims = {"head": (-1,), "all": (-2, -1)}[self.model.qk_norm_over]
        y = rmsnorm(x.astype(jnp.float32), self.model.norm_epsilon, dims)
        if kind.has_scale:
            shape = [x.shape[dim] for dim in dims]
            y = y * scale_param(self, kind, math.prod(shape)).reshape(shape)
        # A scale of 1.2 would be 1.2031 in bfloat16, so the result is rounded and not the scale.
        return (y * self.model.qk_scale).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention [B, T, D] -> ([B, T, D], new cache).

    `cache` is None in a plain pass, and else a pair (k, v), each [B, S, K, H].

    With a cache, an input of several tokens is a prompt that fills an empty cache. The filled cache
    comes back. Context.lengths tells how many tokens of the prompt are real.

    A single token a row attends over the cache and itself. Its own k and v [B, 1, K, H] come back
    for the caller to `append`.

    With Context.before, rows of any length attend over the cache and over themselves. The cache has
    one row for each part of the batch, and None comes back for it.
    """

    model: config.Model
    compute: config.Compute
    window: int
    value_embed: bool

    @nn.compact
    def __call__(self, x, context: Context, cache=None):
        model = self.model
        B, T = x.shape[:2]

        q, k, v = self._project_in(x)
        if self.value_embed:
            v = v + self._embed_values(x, context.tokens)
        is_local = self.window > 0 and context.local_angles is not None
        q, k = self._norm_and_rotate(q, k, context.local_angles if is_local else context.angles)
        q = self._scale(q)

        if context.before is not None:
            y = self._continue(q, k, v, cache, context)
            cache = None
        elif cache is not None and T == 1:
            y = self._decode(q, k, v, cache, context.lengths)
            cache = (k, v)
        else:
            pattern = mask.Pattern(self.window, context.segment, context.block, context.common)
            keep = self._draw_keep(B, T)
            if self.is_mutable_collection(MAPS) and not self.is_initializing():
                kernel = self.compute.kernel
                cap = model.attention_softcap
                weights = kernels.attention_weights(kernel, q, k, pattern, cap)
                self.sow(MAPS, "weights", weights)
            y = kernels.attention(
                self.compute.kernel, q, k, v, pattern, model.attention_softcap, keep
            )
            if cache is not None:
                slots = cache[0].shape[1]
                cache = tuple(self._fill(values, context.lengths, slots) for values in (k, v))

        y = sharding.reshape(y, (B, T, model.heads * model.head_dim), "batch", "seq", "heads")
        has_bias = config.has_bias(model, "attention_out")
        out = self._linear(model.embed, ("heads", "embed"), "attention_out", has_bias, "out")
        y = checkpoint_name(project(y, out)[0], "attention_out")
        return dropout(self, y, model.dropout), cache

    def _linear(self, features: int, axes, role: str, bias: bool, name: str) -> Weights:
        return Weights(features, axes, role, self.model, self.compute, bias, name=name)

    def _project_in(self, x):
        """Computes q [B, T, N, H], k and v [B, T, K, H] from x [B, T, D]."""
        model = self.model
        bias = config.has_bias(model, "qkv")
        heads = {
            "q": ("heads", model.heads),
            "k": ("kv_heads", model.kv_heads),
            "v": ("kv_heads", model.kv_heads),
        }

        maps = [
            self._linear(count * model.head_dim, ("embed", axis), "qkv", bias, name)
            for name, (axis, count) in heads.items()
        ]
        parts = []
        for y, (name, (axis, count)) in zip(project(x, *maps), heads.items(), strict=True):
            shape = (*x.shape[:2], count, model.head_dim)
            # The name comes after the reshape, because what is kept lies in memory as it is read.
            y = sharding.reshape(y, shape, "batch", "seq", axis, "head_dim")
            parts.append(checkpoint_name(y, name))
        return parts

    def _norm_and_rotate(self, q, k, angles):
        """Normalises q and k before or after their rotation, where the model does either."""
        model = self.model
        norms = [QkNorm(model, name=f"{name}_norm") for name in "qk"] if model.qk_norm else []

        if norms and not model.qk_norm_after_rope:
            q = norms[0](q)
            k = norms[1](k)
        if angles is not None:
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        if norms and model.qk_norm_after_rope:
            q = norms[0](q)
            k = norms[1](k)
        return q, k

    def _scale(self, q):
        """Brings the scale of the scores into q. The kernels multiply by 1 / sqrt(head_dim)."""
        factor = self.model.attention_scale * math.sqrt(self.model.head_dim)
        if factor in (0, 1):
            return q
        return (q.astype(jnp.float32) * factor).astype(q.dtype)

    def _embed_values(self, x, tokens):
        """Embeds the tokens a second time, as a part of the values [B, T, K, H].

        This is the value residual of Zhou et al. 2024 in the form of modded-nanogpt. A gate per
        head scales it: 3 * sigmoid of a few channels of the stream.
        """
        model = self.model
        width = model.kv_heads * model.head_dim
        lookup = self.compute.embed_lookup
        table = Embed(model.vocab, width, "value_embed", model, lookup, name="value_embed")
        embedded = sharding.reshape(
            table(tokens, x.dtype),
            (*tokens.shape, model.kv_heads, model.head_dim),
            "batch",
            "seq",
            None,
            "head_dim",
        )

        gate = self._linear(model.kv_heads, ("gate", "kv_heads"), "gate", False, "value_gate")
        strength = 3 * jax.nn.sigmoid(project(x[..., : model.value_embed_gate], gate)[0])
        return sharding.constrain(embedded, *KEY_AXES) * strength[..., None]

    def _draw_keep(self, B, T):
        """Draws attention dropout as factors [B, N, T, T], or returns None without it."""
        rate = self.model.attention_dropout
        if rate == 0.0 or not self.has_rng("dropout"):
            return None
        keep = jax.random.bernoulli(
            self.make_rng("dropout"),
            1 - rate,
            (B, self.model.heads, T, T),
            out_sharding=sharding.out_spec("batch", "heads", "seq", "keys"),
        )
        return keep / (1 - rate)

    def _decode(self, q, k, v, cache, lengths):
        """Lets one new token a row attend over the cache and itself -> [B, 1, N, H]."""

        def run(q, k, v, cached_k, cached_v, lengths):
            cap = self.model.attention_softcap
            return decode_token(q, k, v, cached_k, cached_v, lengths, cap)

        axes = (QUERY_AXES, KEY_AXES, KEY_AXES, KEY_AXES, KEY_AXES, ("batch",))
        return sharding.run_local(run, axes, QUERY_AXES)(q, k, v, *cache, lengths)

    def _continue(self, q, k, v, cache, context: Context):
        """Lets rows attend over the text that they continue, and over themselves."""
        pattern = mask.Pattern(0, context.segment, context.block, context.common)

        def run(q, k, v, text_k, text_v, before, *columns):
            own = mask.make_mask(mask.Pattern(0, *columns), q.shape[1])
            cap = self.model.attention_softcap
            return attend_after_text(q, k, v, own, text_k[0], text_v[0], before[0], cap)

        columns = kernels.axes_of_columns(pattern)
        axes = (QUERY_AXES, *[KEY_AXES] * 4, ("batch",), *columns)
        run_here = sharding.run_local(run, axes, QUERY_AXES)
        return run_here(q, k, v, *cache, context.before, *pattern[1:])

    def _fill(self, values, lengths, slots):
        """Makes the cache of a prompt's keys or values."""

        def run(values, lengths):
            return fill(values, lengths, slots)

        return sharding.run_local(run, (KEY_AXES, ("batch",)), KEY_AXES)(values, lengths)
