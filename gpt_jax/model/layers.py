"""The small parts of a transformer: matmuls, norms, embeddings, positions, feed-forwards (called by
model/).

Shapes: B batch, T sequence, D embed, N heads, H head_dim, F mlp, V vocab. Parameters are float32;
`dtype` is what is multiplied; norms, softmax and logits are summed in float32.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, placing, sharding
from gpt_jax.model.init import make_init, residual_ramp


def matmul(
    x: jax.Array, kernel: jax.Array, out_axis: str | None, precise=None, seq: str = "seq"
) -> jax.Array:
    """x [B, T, D] @ kernel [D, F] -> [B, T, F]; `seq`: how the result's T is laid out,
    `precise`: its dtype. Where no mesh axis cuts T, on activations flattened to two dims: XLA's
    CPU backend runs the backward pass of the three-dim form at half the speed, and no other
    backend minds."""
    if sharding.parts(seq) > 1 or sharding.is_gathered(kernel):
        layout, whole = (sharding.out("batch", over, out_axis) for over in (seq, "seq"))
        return (
            _matmul(x, kernel, precise, layout)
            if layout == whole
            else _scattered(x, kernel, precise, layout, whole)
        )
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(
        rows, kernel, preferred_element_type=precise, out_sharding=sharding.out("batch", out_axis)
    )
    return sharding.reshape(y, (*x.shape[:-1], kernel.shape[-1]), "batch", seq, out_axis)


def _matmul(x, kernel, precise, layout):
    return jnp.matmul(x, kernel, preferred_element_type=precise, out_sharding=layout)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _scattered(x, kernel, precise, layout, whole):
    """`_matmul` whose result is cut along T (`layout`) where x is not (`whole`). Backward the
    result's gradient is gathered first: JAX 0.10 has no transpose for kernels that
    `sharding.use` has gathered."""
    return _matmul(x, kernel, precise, layout)


def _scattered_backward(precise, layout, whole, saved, g):
    return jax.vjp(lambda x, kernel: _matmul(x, kernel, precise, whole), *saved)[1](
        jax.reshard(g, whole)
    )


_scattered.defvjp(
    lambda x, kernel, *how: (_scattered(x, kernel, *how), (x, kernel)), _scattered_backward
)


class Weights(nn.Module):
    """Kernel [in, features] and bias [features] (None without one) of a linear map, in the
    compute dtype and laid out for use; `axes` are the kernel's logical axes."""

    features: int
    axes: tuple[str, str]
    role: str
    model: config.Model
    bias: bool

    @nn.compact
    def __call__(self, width: int):
        dtype = jnp.dtype(self.model.dtype)
        init = sharding.stored(make_init(self.role, self.model), self.axes)
        kernel = sharding.use(self.param("kernel", init, (width, self.features)), self.axes, dtype)
        if not self.bias:
            return kernel, None
        bias = self.param(
            "bias", sharding.stored(nn.initializers.zeros, self.axes[1:]), (self.features,)
        )
        return kernel, sharding.constrain(bias.astype(dtype), *self.axes[1:])


def project(x: jax.Array, *maps: Weights) -> list[jax.Array]:
    """x [B, T, in] through several linear maps -> one [B, T, features] each. On a CPU the
    kernels are joined into one matmul where no mesh axis splits the features: 5 % of a small
    step; a TPU loses a sixth of a large one by it (joining, cutting, and a matmul at half the
    speed, by the compiler's cycles). With `shard_sequence` the stream is gathered over tensor on
    the way in and scattered on the way out (Korthikanti et al. 2022)."""
    inside, model = maps[0].axes[0], maps[0].model
    back = inside in ("heads", "mlp")  # to the stream: the sum over tensor ends here
    if model.shard_sequence and not back:
        x = sharding.constrain(x, "batch", "seq", None)
    weights = [linear(x.shape[-1]) for linear in maps]
    if len(maps) > 1 and sharding.axis_size("tensor") == 1 and sharding.platform() == "cpu":
        ends = np.cumsum([linear.features for linear in maps])[:-1]
        parts = jnp.split(
            matmul(x, jnp.concatenate([kernel for kernel, _ in weights], 1), None), ends, -1
        )
    else:
        parts = [
            matmul(x, kernel, linear.axes[1], seq=model.stream if back else "seq")
            for linear, (kernel, _) in zip(maps, weights)
        ]
    return [y if bias is None else y + bias for y, (_, bias) in zip(parts, weights)]


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
            y = y * self.param(
                "scale", sharding.stored(nn.initializers.ones, ("scale",)), (x.shape[-1],)
            )
        if has_bias and self.model.bias:
            y = y + self.param(
                "bias", sharding.stored(nn.initializers.zeros, ("scale",)), (x.shape[-1],)
            )
        return y.astype(x.dtype)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of table [V, D] for tokens [B, T] -> [B, T, D]. Over a tensor-sharded vocabulary each
    device looks up what it holds and the parts are summed (Shoeybi et al. 2019). In float32: the
    backward pass sums rows of equal tokens."""

    def rows(table, tokens):
        return table[tokens]

    def own_rows(table, tokens):
        mine = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        inside = (mine >= 0) & (mine < table.shape[0])
        found = jnp.where(inside[..., None], table[jnp.clip(mine, 0, table.shape[0] - 1)], 0)
        return jax.lax.psum(found, "tensor")

    return look_up(
        rows if sharding.axis_size("tensor") == 1 else own_rows,
        table,
        ("vocab", "embed"),
        tokens,
        "batch",
    )


def look_up(function, table, axes: tuple[str, str], index, rows: str | None):
    """function(table [., D], index [B, T]) -> [B, T, D] on each device. The table, of logical
    `axes`, is gathered there: so its gradient is scattered, and not summed whole on every
    device. `rows`: the axis of B."""
    where, wide = sharding.gathered_axes(table, axes), sharding.STORED[axes[1]]
    if where:
        dim, names = where

        def gather(table, index):
            return function(sharding.gather(table, names, dim), index)

    with sharding.using({axes[1]: wide} if where else {}):
        mapped = sharding.local(
            gather if where else function, (axes, (rows, "seq")), (rows, "seq", None)
        )
        return mapped(table.astype(jnp.float32), index)


class Embed(nn.Module):
    """A table [rows, features] and its lookup."""

    rows: int
    features: int
    role: str
    model: config.Model

    def setup(self):
        init = sharding.stored(make_init(self.role, self.model), ("vocab", "embed"))
        self.table = self.param("table", init, (self.rows, self.features))

    def __call__(self, tokens):
        return lookup(self.table, tokens)


def dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """x [B, T, D] with entries dropped at `rate`, only when the caller passed a "dropout" key to
    `apply`."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    keep = placing.reorder(jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape))
    return jnp.where(sharding.lay_out(keep, x), x / (1 - rate), 0).astype(x.dtype)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap) (Gemma 2); cap 0: x."""
    return x if cap == 0.0 else cap * jnp.tanh(x / cap)


def rotary_frequencies(model: config.Model) -> np.ndarray:
    """Radians per position [R / 2] for the R = rope_fraction * head_dim rotating channels (Su et
    al. 2021), with Llama-3's scaling of the long wavelengths where `rope_scale_factor` > 1."""
    rotating = int(model.head_dim * model.rope_fraction)
    frequencies = model.rope_base ** -(np.arange(0, rotating, 2, dtype=np.float64) / rotating)
    if model.rope_scale_factor > 1:
        turns = (
            model.rope_scale_original_seq * frequencies / (2 * np.pi)
        )  # over the original context
        smooth = (turns - model.rope_scale_low) / (model.rope_scale_high - model.rope_scale_low)
        smooth = np.clip(smooth, 0, 1)
        frequencies = frequencies * (smooth + (1 - smooth) / model.rope_scale_factor)
    return frequencies.astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first channels of x [B, T, N, H] by angles whose cos and sin are [B or 1, T, R
    / 2], in float32. Channel i pairs with i + R / 2 (the layout of GPT-NeoX and Hugging Face's
    Llama)."""
    half = cos.shape[-1]
    cos, sin = (jnp.concatenate(parts, -1)[:, :, None] for parts in ((cos, cos), (-sin, sin)))
    turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    turned = (turning * cos + jnp.roll(turning, half, -1) * sin).astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Vaswani et al. 2017: [B or 1, T] positions -> [B or 1, T, width], sines then cosines."""
    rates = np.float32(10_000.0) ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    angles = position[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


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

    @nn.compact
    def __call__(self, x):
        model = self.model
        activation, gated = FFNS[self.name_of_row]

        def linear(features, axes, role, name):
            return Weights(features, axes, role, model, model.bias, name=name)

        names = ("up", "gate") if gated else ("up",)
        up, *gate = project(
            x, *(linear(model.mlp, ("embed", "mlp"), "mlp_in", name) for name in names)
        )
        hidden = activation(gate[0]) * up if gated else activation(up)
        return project(hidden, linear(model.embed, ("mlp", "embed"), "mlp_out", "down"))[0]


class PositionTable(nn.Module):
    """Learned positions: [1, T] `shared` by all rows, or [B, T] -> the same with a dim D."""

    model: config.Model

    @nn.compact
    def __call__(self, position, shared: bool):
        axes = ("position", "embed")
        table = self.param(
            "table",
            sharding.stored(make_init("position", self.model), axes),
            (self.model.max_seq, self.model.embed),
        )
        return look_up(
            lambda table, index: table[index], table, axes, position, None if shared else "batch"
        )


class ResidualScalars(nn.Module):
    """Factors of the stream and of the embedding at every layer: two [layers] vectors."""

    layers: int

    @nn.compact
    def __call__(self):
        def make(name, *ends):
            return self.param(
                name, sharding.stored(residual_ramp(*ends), ("layers",)), (self.layers,)
            )

        return make("x", 1.15, 1.05), make("x0", 0.20, 0.05)


class Factor(nn.Module):
    """One learned number [1], from `start`."""

    start: float

    @nn.compact
    def __call__(self):
        return self.param(
            "scale", sharding.stored(nn.initializers.constant(self.start), ("scale",)), (1,)
        )


class Smear(nn.Module):
    """A gated share of the token `before` joins each token, both [B, T, D] (modded-nanogpt,
    nanochat)."""

    model: config.Model

    @nn.compact
    def __call__(self, x, before):
        weights = Weights(1, ("gate", None), "gate", self.model, False, name="gate")
        gate = jax.nn.sigmoid(project(x[..., : self.model.smear_gate], weights)[0])
        scale = Factor(0.0, name="factor")().astype(x.dtype)
        return x + scale * gate * before


class Head(nn.Module):
    """The untied output matrix [D, V]."""

    model: config.Model

    @nn.compact
    def __call__(self, dtype):
        axes = ("embed", "vocab")
        kernel = self.param(
            "kernel",
            sharding.stored(make_init("head", self.model), axes),
            (self.model.embed, self.model.vocab),
        )
        return sharding.use(kernel, axes, dtype)
