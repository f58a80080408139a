"""The transformer: blocks laid out by pattern, scanned over depth (called by experiment and infer).

Shapes: B batch, T sequence, D embed, V vocab. Parameter paths are API:
  embed/table [V, D]   position/table [max_seq, D]   blocks/<i>/… [repeats, …]   tail/<i>/… […]   final_norm/…
  residual/x, residual/x0 [layers]   smear/gate/kernel, smear/factor/scale [1]   backout/scale [1]   head/kernel [D, V]
`blocks/<i>` holds layers i, i + period, i + 2 period, …; `tail` the layers after the last whole
period.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.config import LayerSpec, layer_specs, layout
from gpt_jax.errors import UsageError
from gpt_jax.model import stages
from gpt_jax.model.attention.attention import Attention, Context
from gpt_jax.model.attention.cache import append, cache_slots
from gpt_jax.model.experts.balance import add_layer, empty_report
from gpt_jax.model.experts.moe import Moe
from gpt_jax.model.layers.embed import Embed, Head, PositionTable
from gpt_jax.model.layers.extras import Factor, ResidualScalars, Smear, dropout, softcap
from gpt_jax.model.layers.linear import matmul
from gpt_jax.model.layers.mlp import Mlp
from gpt_jax.model.layers.norms import Norm
from gpt_jax.model.layers.positions import rotary_frequencies, sinusoids

MIXERS = {"attention": Attention}
REMATS = {
    "block": None,  # recompute the block from its input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul results
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


# How a model runs when nobody says otherwise: plainly, and in float32.
REFERENCE = config.Compute(kernel="reference")


class Block(nn.Module):
    """One layer: a mixer and a feed-forward, each with its norm and residual."""

    model: config.Model
    compute: config.Compute
    spec: LayerSpec

    @nn.compact
    def __call__(self, x, x0, scalars, cache, context: Context):
        model, spec = self.model, self.spec
        pre = model.norm_position == "pre"
        norms = [Norm(model, name=name) for name in ("mixer_norm", "mlp_norm")]

        def before(i, x):
            return norms[i](x) if pre else x

        def after(i, x):
            return x if pre else norms[i](x)

        if scalars is not None:
            x = (scalars[0] * x + scalars[1] * x0).astype(x.dtype)
        mixer = MIXERS[spec.mixer](
            model, self.compute, spec.window, spec.value_embed, name=spec.mixer
        )
        y, cache = mixer(before(0, x), context, cache)
        x = after(0, x + y)
        if spec.ffn == "moe":
            y, stats = Moe(model, self.compute, name="mlp")(before(1, x), context.segment)
        else:
            y, stats = Mlp(spec.ffn, model, self.compute, name="mlp")(before(1, x)), {}
        x = after(1, x + dropout(self, y, model.dropout))
        self.sow("intermediates", "residual", x)
        return x, cache, stats


class Period(nn.Module):
    """The layers `specs` in order: the body of the scan over depth, and the tail. The carry is
    the stream, the stream before layer 0, the stream halfway up (None without `backout`), and
    what mixtures of experts report (balance.py); `first` is the number of the first layer here;
    `scalars`: [layers here] pairs. `looped`: compiled as the body of a loop, and not inline."""

    model: config.Model
    compute: config.Compute
    specs: tuple[LayerSpec, ...]
    looped: bool

    @nn.compact
    def __call__(self, carry, first, scalars, caches, context: Context):
        x, x0, half, report = carry
        block, policy = Block, self.compute.remat
        if policy != "none":
            # Inline, the compiler would merge the second computation with the first and keep
            # everything after all; a loop's backward pass is a loop of its own, out of its reach.
            block = nn.remat(Block, prevent_cse=not self.looped, policy=REMATS[policy])
        new = {}
        for i, spec in enumerate(self.specs):
            scalar = None if scalars is None else (scalars[0][i], scalars[1][i])
            cache = None if caches is None else caches[str(i)]
            x, new[str(i)], stats = block(self.model, self.compute, spec, name=str(i))(
                x, x0, scalar, cache, context
            )
            report = add_layer(report, stats, self.model, first + i)
            if half is not None:
                half = jnp.where(first + i == self.model.layers // 2, x, half)
        return (x, x0, half, report), None if caches is None else new


class Transformer(nn.Module):
    """A decoder-only language model. `compute.kernel` is a concrete kernel name (see
    kernels.choose)."""

    model: config.Model
    compute: config.Compute = REFERENCE

    def setup(self):
        model = self.model
        self.plan = layout(layer_specs(model))
        self.embed = Embed(model.vocab, model.embed, "embed", model)
        if model.position == "learned":
            self.position = PositionTable(model)
        unroll = self.compute.unroll or self.plan.repeats
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, 0, nn.broadcast),
            length=self.plan.repeats,
            unroll=unroll,
        )
        self.blocks = scanned(
            model, self.compute, self.plan.period, looped=unroll < self.plan.repeats
        )
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
        """Logits [B, T, V] in float32 for `batch` columns tokens [B, T] and, where given,
        segment, position and ar (see `features`)."""
        return self.unembed(self.features(batch)[0])

    def features(self, batch: dict) -> tuple[jax.Array, dict]:
        """(last hidden state [B, T, D] in the compute dtype, report). Columns that are absent
        mean: one document (segment), 0 … T-1 (position), causal (ar). Report: what mixtures of
        experts add up over layers for each row, see `balance.empty_report`; {} without them."""
        hidden, _, report = self._forward(batch, None, None)
        return hidden, report

    def step(self, batch: dict, cache: dict, lengths: jax.Array) -> tuple[jax.Array, dict]:
        """One pass with a KV cache from `make_cache`: a prompt of which `lengths` [B] tokens are
        real (right-padded), or one token a row with `lengths` tokens before it. -> (hidden [B,
        T, D], cache)."""
        with sharding.using_rules(sharding.WHOLE_ROWS):
            return self._step(batch, cache, lengths)

    def _step(self, batch, cache, lengths):
        hidden, new, _ = self._forward(batch, cache, lengths)
        if batch["tokens"].shape[1] > 1:
            return hidden, new
        keys = (None, "batch", "seq", "kv_heads", "head_dim")
        put = sharding.run_local(append, (keys, keys, ("batch",)), keys)

        def tail(old, x):
            return put(old[None], x[None], lengths)[0]

        return hidden, new | {
            "blocks": jax.tree.map(
                lambda old, x: put(old, x, lengths), cache["blocks"], new["blocks"]
            ),
            "tail": jax.tree.map(tail, cache["tail"], new["tail"]),
        }

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> logits [B, T, V], float32."""
        return self.logits(self.output(hidden.dtype), hidden)

    def output(self, dtype) -> jax.Array:
        """The output matrix [D, V] in `dtype`, as it is used."""
        if self.model.tied:
            return sharding.use_weight(self.embed.table, ("vocab", "embed"), dtype).T
        return self.head(dtype)

    def logits(self, head: jax.Array, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] through `output`'s matrix -> logits [B, T, V], float32."""
        return softcap(matmul(hidden, head, "vocab", jnp.float32), self.model.logit_softcap)

    def _forward(self, batch, cache, lengths):
        model, plan = self.model, self.plan
        tokens = batch["tokens"]
        if (
            model.position == "learned" and tokens.shape[1] > model.max_seq
        ):  # a lookup beyond the table would clamp
            raise UsageError(
                f"{tokens.shape[1]} tokens do not fit the model's context of {model.max_seq}"
            )
        position = (
            batch["position"] if "position" in batch else sharding.make_positions(tokens.shape[1])
        )

        def running(ar):
            return jnp.cumsum(ar, axis=1, dtype=jnp.int32)

        block = (
            sharding.apply_in_text_order(running, batch["ar"], "batch", "seq")
            if "ar" in batch
            else None
        )
        angles = None
        if model.position == "rotary":
            radians = position[..., None].astype(jnp.float32) * rotary_frequencies(model)
            angles = (jnp.cos(radians), jnp.sin(radians))
        context = Context(
            tokens, batch["segment"] if "segment" in batch else None, block, angles, lengths
        )
        x = self._embed(tokens, position, "position" not in batch)
        extra = {}
        if model.smear:
            x, extra["previous"] = self._smear(x, context, cache)
        x = sharding.constrain(x, "batch", self.compute.stream, None)
        scalars = self.residual() if model.residual_scalars else None
        split = len(plan.period) * plan.repeats
        stacked = (
            None if scalars is None else tuple(s[:split].reshape(plan.repeats, -1) for s in scalars)
        )
        caches = (None, None) if cache is None else (cache["blocks"], cache["tail"])
        carry = (
            x,
            x,
            jnp.zeros_like(x) if model.backout else None,
            empty_report(model, tokens.shape[0]),
        )
        firsts = jnp.arange(0, split, len(plan.period))
        if sharding.axis_size("pipeline") > 1 and cache is None and not self.is_initializing():
            carry, blocks = self._through_stages(carry, firsts, stacked, context), None
        else:
            carry, blocks = self.blocks(carry, firsts, stacked, caches[0], context)
        tail = caches[1]
        if plan.tail:
            rest = None if scalars is None else tuple(s[split:] for s in scalars)
            carry, tail = self.tail(carry, split, rest, tail, context)
        x, _, half, report = carry
        if model.backout:
            x = x - self.backout().astype(x.dtype) * half
        if model.final_norm:
            x = self.final_norm(x)
        x = sharding.constrain(x, "batch", "seq", None)
        return x, None if cache is None else {"blocks": blocks, "tail": tail} | extra, report

    def _through_stages(self, carry, firsts, scalars, context):
        """The stream after the scanned layers, which stand in stages over the mesh axis
        pipeline."""
        period = Period(self.model, self.compute, self.plan.period, looped=True, parent=None)
        shared = context.angles is not None and context.angles[0].shape[0] == 1  # by all rows

        def layer(carry, weights, columns):
            params, first, scalars = weights
            context = columns._replace(angles=angles) if shared else columns
            return period.apply({"params": params}, carry, first, scalars, None, context)[0]

        angles, columns = context.angles, context._replace(angles=None) if shared else context
        stacked = (self.variables["params"]["blocks"], firsts, scalars)
        return stages.run(
            layer,
            stacked,
            carry,
            columns,
            self.compute.pipeline_rounds,
            self.compute.pipeline_microbatches,
            self.compute.unroll or self.plan.repeats,
        )

    def _smear(self, x, context, cache):
        """(x with its predecessors' share, [B, D] what the next token's predecessor is when
        there is a cache)."""
        if cache is not None and x.shape[1] == 1:
            return self.smear(x, cache["previous"][:, None]), x[:, 0]
        before = sharding.apply_in_text_order(
            lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], x, "batch", "seq", None
        )
        if context.segment is not None:
            segment = sharding.apply_in_text_order(
                lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, :-1], context.segment, "batch", "seq"
            )
            before = jnp.where((segment == context.segment)[..., None], before, 0)
        last = None
        if cache is not None:
            place = jnp.arange(x.shape[1])[None] == context.lengths[:, None] - 1
            last = jnp.where(place[..., None], x, 0).sum(1)
        return self.smear(x, before), last

    def _embed(self, tokens, position, shared):
        model = self.model
        x = self.embed(tokens)
        if model.position == "learned":
            x = x + self.position(position, shared)
        elif model.position == "sinusoidal":
            x = x + sinusoids(position, model.embed)
        x = dropout(self, x.astype(jnp.dtype(self.compute.dtype)), model.dropout)
        return self.embed_norm(x) if model.embed_norm else x


def make_cache(model: config.Model, compute: config.Compute, rows: int, length: int) -> dict:
    """An empty KV cache for `rows` sequences of up to `length` tokens: per layer (k, v), each
    [rows, slots, kv_heads, head_dim], stacked over repeats under `blocks`; `previous` [rows, D]
    for `smear`."""
    if length > model.max_seq and model.position == "learned":
        raise UsageError(f"{length} tokens do not fit the model's context of {model.max_seq}")
    plan, dtype = layout(layer_specs(model)), jnp.dtype(compute.dtype)

    def layer(spec, *lead):
        shape = (*lead, rows, cache_slots(spec.window, length), model.kv_heads, model.head_dim)
        return tuple(
            sharding.constrain(
                jnp.zeros(shape, dtype),
                *(None,) * len(lead),
                "batch",
                "seq",
                "kv_heads",
                "head_dim",
            )
            for _ in "kv"
        )

    made = {
        "blocks": {str(i): layer(spec, plan.repeats) for i, spec in enumerate(plan.period)},
        "tail": {str(i): layer(spec) for i, spec in enumerate(plan.tail)} if plan.tail else None,
    }
    if model.smear:
        made["previous"] = sharding.constrain(jnp.zeros((rows, model.embed), dtype), "batch", None)
    return made


def init_params(model: config.Model, key: jax.Array) -> dict:
    """Fresh parameters, float32, laid out by the STORED rules; the same values on every mesh.
    Call it under jit."""
    with sharding.using_rules(sharding.WHOLE_ROWS):
        tokens = sharding.constrain(
            jnp.zeros((sharding.count_parts("batch"), 1), jnp.int32), "batch", "seq"
        )
        params = Transformer(model).init(key, {"tokens": tokens})["params"]
    return params | {"blocks": sharding.over_stages(params["blocks"])}


def abstract_params(model: config.Model) -> dict:
    """The parameters' shapes and dtypes (with shardings under a mesh), without making them."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
