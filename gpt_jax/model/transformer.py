"""The transformer: blocks laid out by pattern, scanned over depth.

Shapes: B batch, T sequence, D embed, V vocab. Parameter paths are API, and these are they.

  embed/table [V, D]   position/table [max_seq, D]
  blocks/<i>/… [repeats, …]   tail/<i>/… […]   final_norm/…
  residual/x, residual/x0 [layers]
  smear/gate/kernel, smear/factor/scale [1]   backout/scale [1]
  head/kernel [D, V]

`blocks/<i>` holds the layers i, i + period, i + 2 period and so on. `tail` holds the layers after
the last whole period.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.config import LayerSpec, layer_specs, layout
from gpt_jax.errors import UsageError
from gpt_jax.model import stages
from gpt_jax.model.attention.attention import MAPS, Context
from gpt_jax.model.block import Block
from gpt_jax.model.experts.balance import add_layer, empty_report
from gpt_jax.model.kv_cache import append_token
from gpt_jax.model.layers.dropout import dropout
from gpt_jax.model.layers.embed import Embed, Head, PositionTable, transpose_table
from gpt_jax.model.layers.extras import (
    Factor,
    ResidualScalars,
    Smear,
    add_scaled,
    softcap,
)
from gpt_jax.model.layers.linear import ADAPTERS, matmul
from gpt_jax.model.layers.norms import Norm
from gpt_jax.model.layers.positions import rotary_frequencies, sinusoids
from gpt_jax.model.remat import REMATS

# How a model runs when nobody says otherwise: plainly, and in float32.
REFERENCE = config.Compute(kernel="reference")


class Period(nn.Module):
    """The layers `specs` in order: the body of the scan over depth, and the tail.

    The carry has four parts: the stream, the stream before layer 0, the stream halfway up, and
    what mixtures of experts report (experts/balance.py). The third is None without `backout`.

    `first` is the number of the first layer here. `scalars` are two vectors [layers here], or
    None. `looped` tells that the layers are compiled as the body of a loop, and not inline.
    """

    model: config.Model
    compute: config.Compute
    specs: tuple[LayerSpec, ...]
    looped: bool

    @nn.compact
    def __call__(self, carry, first, scalars, caches, context: Context):
        x, x0, half, report = carry
        block = self._choose_block()

        new_caches = {}
        for i, spec in enumerate(self.specs):
            scalar = None if scalars is None else (scalars[0][i], scalars[1][i])
            cache = None if caches is None else caches[str(i)]
            layer = block(self.model, self.compute, spec, name=str(i))
            x, new_caches[str(i)], stats = layer(x, x0, scalar, cache, context)

            report = add_layer(report, stats, self.model, first + i)
            if half is not None:
                half = jnp.where(first + i == self.model.layers // 2, x, half)
        return (x, x0, half, report), None if caches is None else new_caches

    def _choose_block(self):
        """Chooses Block, or Block under the remat policy.

        Inline, the compiler would merge the second computation with the first, and keep everything
        after all. `prevent_cse` forbids it. A loop does not need that, because its backward pass is
        a loop of its own.
        """
        policy = self.compute.remat
        if policy == "none":
            return Block
        rule = REMATS[policy](self.compute)
        return nn.remat(Block, prevent_cse=not self.looped, policy=rule)


class Transformer(nn.Module):
    """A decoder-only language model.

    `compute.kernel` must be the name of a kernel: `choose_kernel` turns `auto` into one.
    """

    model: config.Model
    compute: config.Compute = REFERENCE

    def setup(self):
        model = self.model
        self.plan = layout(layer_specs(model))
        self.embed = Embed(model.vocab, model.embed, "embed", model, self.compute.embed_lookup)
        if model.position == "learned":
            self.position = PositionTable(model)

        unroll = self.compute.unroll or self.plan.repeats
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0, ADAPTERS: 0, "intermediates": 0, MAPS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType] the stub knows one
            length=self.plan.repeats,
            unroll=unroll,
        )
        is_looped = unroll < self.plan.repeats
        self.blocks = scanned(model, self.compute, self.plan.period, looped=is_looped)
        if self.plan.tail:
            self.tail = Period(model, self.compute, self.plan.tail, looped=False)

        if model.embed_norm:
            self.embed_norm = Norm(model)
        if model.final_norm:
            self.final_norm = Norm(model)
        if model.residual_scalars:
            self.residual = ResidualScalars(model.layers)
        if model.smear:
            self.smear = Smear(model, self.compute)
        if model.backout:
            self.backout = Factor(0.2)
        if not model.tied:
            self.head = Head(model)

    def __call__(self, batch: dict) -> jax.Array:
        """Computes logits [B, T, V] in float32 from the columns of `features`."""
        return self.unembed(self.features(batch)[0])

    def features(self, batch: dict) -> tuple[jax.Array, dict]:
        """Computes (last hidden state [B, T, D] in the compute dtype, report).

        `batch` has the column tokens [B, T], and may have others. Without `segment` a row is one
        document. Without `position` it has positions 0 … T - 1. Without `ar` it is causal.
        `common` marks tokens that all segments of a row see; without it each sees its own alone.

        The report is what mixtures of experts add up over layers for each row, as described in
        `balance.empty_report`. It is {} for a model without them.
        """
        hidden, _, report = self._forward(batch, None, None)
        return hidden, report

    def step(self, batch: dict, cache: dict, lengths: jax.Array) -> tuple[jax.Array, dict]:
        """Runs one pass with a KV cache from `make_cache` -> (hidden [B, T, D], cache).

        The pass reads a prompt, right-padded, of which `lengths` [B] tokens are real. Or it reads
        one token a row, with `lengths` tokens before it.
        """
        with sharding.using_rules(sharding.WHOLE_ROWS):
            hidden, new, _ = self._forward(batch, cache, lengths)
            if batch["tokens"].shape[1] > 1:
                return hidden, new
            return hidden, append_token(cache, new, lengths)

    def continue_text(self, batch: dict, cache: dict, before: jax.Array) -> jax.Array:
        """Computes the hidden states [B, T, D] of rows that all continue one text.

        `cache` is what `step` made of the text in one row for each part of the batch, and `before`
        counts the tokens of each of its rows. The column `position` must go on from them. Windows
        and smear look at the places of a row, and are wrong here.
        """
        return self._forward(batch, cache, None, before)[0]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Turns hidden [B, T, D] into logits [B, T, V], float32."""
        return self.logits(self.output(hidden.dtype), hidden)

    def output(self, dtype) -> jax.Array:
        """Returns the output matrix [D, V] rounded to `dtype`, laid out for use.

        Its own dtype is the one in which devices sum its gradient, see `sharding.use_weight`.
        """
        gradient_dtype = self.compute.gradient_dtype
        if self.model.tied:
            axes = ("vocab", "embed")
            table = sharding.use_weight(self.embed.table, axes, dtype, gradient_dtype)
            return table.T if table.dtype == dtype else transpose_table(table)
        return self.head(dtype, gradient_dtype)

    def logits(self, head: jax.Array, hidden: jax.Array) -> jax.Array:
        """Multiplies hidden [B, T, D] with `output`'s matrix -> logits [B, T, V], float32."""
        return softcap(matmul(hidden, head, "vocab", jnp.float32), self.model.logit_softcap)

    def _forward(self, batch, cache, lengths, before=None) -> tuple[jax.Array, Any, dict]:
        """Computes (hidden [B, T, D], new cache or None, report)."""
        model = self.model
        tokens = batch["tokens"]
        length = tokens.shape[1]
        # A lookup beyond the table would clamp silently.
        if model.position == "learned" and length > model.max_seq:
            raise UsageError(f"{length} tokens do not fit the model's context of {model.max_seq}")

        has_positions = "position" in batch
        position = batch["position"] if has_positions else sharding.make_positions(length)
        context = self._make_context(batch, position, lengths, before)
        x = self._embed(tokens, position, not has_positions)
        extra = {}
        if model.smear:
            x, extra["previous"] = self._smear(x, context, cache)

        x = sharding.constrain(x, "batch", self.compute.stream, None)
        (x, _, half, report), caches = self._run_layers(x, context, cache)
        if half is not None:
            x = add_scaled(x, -self.backout(), half)
        if model.final_norm:
            x = self.final_norm(x)

        x = sharding.constrain(x, "batch", "seq", None)
        return x, None if cache is None else caches | extra, report

    def _make_context(self, batch, position, lengths, before) -> Context:
        """Gathers what every layer needs of the batch."""

        def sum_up(ar):
            return jnp.cumsum(ar, axis=1, dtype=jnp.int32)

        block = None
        if "ar" in batch:
            block = sharding.apply_in_text_order(sum_up, batch["ar"], "batch", "seq")

        angles = local = None
        if self.model.position == "rotary":
            angles = self._make_angles(position, is_local=False)
            if self.model.rope_local_base:
                local = self._make_angles(position, is_local=True)

        segment = batch.get("segment")
        common = batch.get("common")
        return Context(batch["tokens"], segment, block, angles, lengths, local, common, before)

    def _make_angles(self, position, is_local):
        """Computes cos and sin [B or 1, T, R / 2] of rotary positions [B or 1, T]."""
        frequencies = rotary_frequencies(self.model, is_local)
        radians = position[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(radians), jnp.sin(radians)

    def _embed(self, tokens, position, is_shared):
        """Embeds tokens [B, T] -> [B, T, D]. `is_shared`: all rows have the same positions."""
        model = self.model
        dtype = jnp.dtype(self.compute.dtype)
        x = self.embed(tokens, dtype if config.is_rounded_at_once(model) else jnp.float32)
        if model.embed_scale != 1:
            x = x * model.embed_scale
        if model.position == "learned":
            x = x + self.position(position, is_shared)
        elif model.position == "sinusoidal":
            x = x + sinusoids(position, model.embed)

        x = dropout(self, x.astype(dtype), model.dropout)
        return self.embed_norm(x) if model.embed_norm else x

    def _smear(self, x, context, cache):
        """Adds each token's predecessor -> (x, last).

        `last` [B, D] is the predecessor of the next token. It is None without a cache.
        """
        if cache is not None and x.shape[1] == 1:
            return self.smear(x, cache["previous"][:, None]), x[:, 0]

        before = sharding.apply_in_text_order(_shift_right, x, "batch", "seq", None)
        if context.segment is not None:
            segment = sharding.apply_in_text_order(_shift_right, context.segment, "batch", "seq")
            before = jnp.where((segment == context.segment)[..., None], before, 0)

        last = None
        if cache is not None:
            is_last = jnp.arange(x.shape[1])[None] == context.lengths[:, None] - 1
            last = jnp.where(is_last[..., None], x, 0).sum(1)
        return self.smear(x, before), last

    def _run_layers(self, x, context, cache):
        """Sends the stream through all layers -> (carry of Period, the caches of the layers)."""
        model = self.model
        plan = self.plan
        split = len(plan.period) * plan.repeats  # the first layer of the tail

        scalars = self.residual() if model.residual_scalars else None
        stacked = None
        if scalars is not None:
            stacked = tuple(s[:split].reshape(plan.repeats, -1) for s in scalars)
        half = jnp.zeros_like(x) if model.backout else None
        carry = (x, x, half, empty_report(model, x.shape[0]))

        firsts = jnp.arange(0, split, len(plan.period))
        if sharding.axis_size("pipeline") > 1 and cache is None and not self.is_initializing():
            carry = self._run_stages(carry, firsts, stacked, context)
            blocks = None
        else:
            caches = None if cache is None else cache["blocks"]
            carry, blocks = self.blocks(carry, firsts, stacked, caches, context)

        tail = None if cache is None else cache["tail"]
        if plan.tail:
            rest = None if scalars is None else tuple(s[split:] for s in scalars)
            carry, tail = self.tail(carry, split, rest, tail, context)
        return carry, {"blocks": blocks, "tail": tail}

    def _run_stages(self, carry, firsts, scalars, context):
        """Sends the carry through the scanned layers, in stages over the mesh axis pipeline."""
        period = Period(self.model, self.compute, self.plan.period, looped=True, parent=None)

        # Angles that all rows share have no dim of rows, and cannot be split into microbatches.
        angles = dict(angles=context.angles, local_angles=context.local_angles)
        is_shared = context.angles is not None and context.angles[0].shape[0] == 1
        columns = context._replace(angles=None, local_angles=None) if is_shared else context

        def layer(carry, weights, columns):
            variables, first, scalars = weights
            context = columns._replace(**angles) if is_shared else columns
            return period.apply(variables, carry, first, scalars, None, context)[0]

        variables = {
            name: self.variables[name]["blocks"]
            for name in ("params", ADAPTERS)
            if "blocks" in self.variables.get(name, {})
        }
        stacked = (variables, firsts, scalars)
        return stages.run(
            layer,
            stacked,
            carry,
            columns,
            self.compute.pipeline_rounds,
            self.compute.pipeline_microbatches,
            self.compute.unroll or self.plan.repeats,
        )


def _shift_right(x):
    """Moves x [B, T, …] on by one token. The first one becomes 0."""
    widths = [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths)[:, :-1]


# ---- parameters ----


def init_params(model: config.Model, key: jax.Array) -> dict:
    """Draws fresh parameters in float32, laid out by the STORED rules.

    The values are the same on every mesh. Call it under jit.
    """
    with sharding.using_rules(sharding.WHOLE_ROWS):
        tokens = jnp.zeros((sharding.count_parts("batch"), 1), jnp.int32)
        tokens = sharding.constrain(tokens, "batch", "seq")
        variables = cast(dict, Transformer(model).init(key, {"tokens": tokens}))
    params = variables["params"]
    return params | {"blocks": sharding.over_stages(params["blocks"])}


def abstract_params(model: config.Model) -> dict:
    """Returns the parameters' shapes and dtypes without making them.

    Under a mesh they have shardings too.
    """
    # No key is made, because the devices of the mesh may not be here.
    return _traced_init.eval_shape(model, jax.eval_shape(jax.random.key, 0))


# Several parts of a program ask for the shapes. A jitted function keeps its trace for each model
# and mesh.
_traced_init = jax.jit(init_params, static_argnums=0)
