"""The mixture-of-experts feed-forward: router, balance and statistics (called by transformer).

Every token is sent to the k experts with its highest scores (Shazeer et al. 2017, arXiv:1701.06538)
and gets their outputs' weighted sum, besides that of shared experts that all tokens go through (Dai
et al. 2024, arXiv:2401.06066). Parameter paths are API: router/kernel [D, E], router/bias [E]
(balance "bias"), experts/{up,gate}/kernel [E, D, F], experts/down/kernel [E, F, D] (experts have no
biases), shared/… as in layers.Mlp. Shapes: B batch, T sequence, D embed, F mlp, E experts, k
choices.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.experts import exchange, local_experts
from gpt_jax.model.layers.mlp import FFNS, Mlp
from gpt_jax.model.parametrization import make_init

ROUTERS = {"softmax": jax.nn.softmax, "sigmoid": lambda logits, axis=-1: jax.nn.sigmoid(logits)}
UP, DOWN = (
    ("experts", "expert_embed", "mlp"),
    ("experts", "mlp", "expert_embed"),
)  # the kernels' logical axes


class Moe(nn.Module):
    """x [B, T, D], segment [B, T] or None (0: padding, which no expert takes) -> (y [B, T, D],
    stats of make_stats)."""

    model: config.Model
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, x, segment):
        model = self.model
        x = sharding.constrain(x, "batch", "seq", None)
        logits, bias = Router(model, name="router")(x)
        choice, weight, scores = route(model, logits, bias)
        real = jnp.ones_like(choice[..., 0], bool) if segment is None else segment != 0
        room = None
        if model.dispatch == "capacity":
            room = exchange.capacity(
                x.shape[1], model.experts, model.experts_per_token, model.capacity_factor
            )
        stats = make_stats(model, logits, scores, choice, real, bias, room)
        kernels = Experts(model, name="experts")(x.shape[-1])
        y = dispatch(
            model,
            self.compute,
            x,
            jnp.where(real[..., None], choice, model.experts),
            weight,
            kernels,
            room,
        )
        if model.shared_experts:
            wide = replace(model, mlp=model.shared_experts * model.expert_mlp)
            y = y + Mlp(model.expert_ffn, wide, self.compute, name="shared")(x)
        return y, stats


class Router(nn.Module):
    """x [B, T, D] -> (logits [B, T, E], bias [E] or None), in float32 whatever the compute dtype
    (Fedus et al. 2021)."""

    model: config.Model

    @nn.compact
    def __call__(self, x):
        model, axes = self.model, ("embed", None)
        init = sharding.stored_init(make_init("router", model), axes)
        kernel = sharding.use_weight(
            self.param("kernel", init, (x.shape[-1], model.experts)), axes, jnp.float32
        )
        logits = jnp.matmul(
            x.astype(jnp.float32),
            kernel,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=sharding.out_spec("batch", "seq", None),
        )
        if model.balance != "bias":
            return logits, None
        return logits, self.param(
            "bias", sharding.stored_init(nn.initializers.zeros, (None,)), (model.experts,)
        )


def route(model: config.Model, logits: jax.Array, bias: jax.Array | None):
    """(choice [B, T, k] of experts, best first and the lower one at a tie; weight [B, T, k] of
    their outputs; scores [B, T, E]). The bias takes part in the choice alone (Wang et al. 2024,
    arXiv:2408.15664)."""
    scores = ROUTERS[model.router](logits, axis=-1)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    choice = jax.lax.top_k(ranked, model.experts_per_token)[1]
    chosen = choice[..., None] == jnp.arange(
        model.experts
    )  # no gather: along rows that are cut it is refused
    weight = jnp.where(chosen, scores[:, :, None], 0).sum(-1)
    if model.router_normalize:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return choice, weight, scores


def make_stats(
    model: config.Model, logits, scores, choice, real, bias, room
) -> dict[str, jax.Array]:
    """Sums over each row's real tokens, float32, [B] but for load: `load` [B, E] choices by expert;
    `dropped` choices beyond the capacity `room`; `router_z` of logsumexp(logits)^2 (Zoph et al.
    2022, arXiv:2202.08906); `balance`, the loss of the Switch Transformer (Fedus et al. 2021,
    arXiv:2101.03961) within the row, times its tokens: E * sum over experts of their part of the
    choices times their mean probability, 1 where all are equal.

    With a router bias also `steer`, which is 0 and has the gradient E * load - choices for the
    bias: how far each expert is above its share, times E, so that sums over rows are sums of
    integers and exact. It is to be added to the objective; the optimiser takes the sign
    (train/optim.py)."""
    mask = real.astype(jnp.float32)[..., None]
    chosen = (choice[..., None] == jnp.arange(model.experts)).sum(2)
    load = (chosen * mask).sum(1)
    total = load.sum(-1, keepdims=True)
    probability = ((scores / (scores.sum(-1, keepdims=True) + 1e-20)) * mask).sum(1)
    stats = {
        "load": load,
        "router_z": (jax.nn.logsumexp(logits, axis=-1) ** 2 * mask[..., 0]).sum(1),
        "balance": model.experts * (load / jnp.maximum(total, 1) * probability).sum(-1),
        "dropped": jnp.zeros_like(load[:, 0])
        if room is None
        else jnp.maximum(load - room, 0).sum(-1),
    }
    if bias is not None:
        excess = model.experts * load - total
        stats["steer"] = ((bias - jax.lax.stop_gradient(bias)) * excess).sum(-1)
    return stats


class Experts(nn.Module):
    """The experts' matrices, float32 as they are stored."""

    model: config.Model

    @nn.compact
    def __call__(self, width: int) -> local_experts.Kernels:
        model, names = self.model, ("up", "gate") if FFNS[self.model.expert_ffn][1] else ("up",)
        down = Stack(model, DOWN, "mlp_out", name="down")((model.experts, model.expert_mlp, width))
        shape = (model.experts, width, model.expert_mlp)
        return local_experts.Kernels(
            down, *(Stack(model, UP, "mlp_in", name=name)(shape) for name in names)
        )


class Stack(nn.Module):
    """A kernel [E, in, out] whose matrices start each like one of a dense layer."""

    model: config.Model
    axes: tuple[str, str, str]
    role: str

    @nn.compact
    def __call__(self, shape):
        one = make_init(self.role, self.model)

        def init(key, shape, dtype=jnp.float32):
            return jax.vmap(lambda key: one(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return self.param("kernel", sharding.stored_init(init, self.axes), shape)


def dispatch(
    model: config.Model,
    compute: config.Compute,
    x,
    choice,
    weight,
    kernels: local_experts.Kernels,
    room: int | None,
):
    """x [B, T, D] through its experts `choice` [B, T, k] (E: none), summed with `weight` -> [B,
    T, D] laid out as the stream. `room`: the choices that an expert takes from a row; None: all."""
    activation = FFNS[model.expert_ffn][0]
    devices, tensor = sharding.axis_size("expert"), sharding.axis_size("tensor")
    scatter, platform = (
        sharding.count_parts(compute.stream) > sharding.count_parts("seq"),
        sharding.platform(),
    )
    kind = sharding.device_kind()
    given = [kernel.astype(x.dtype) for kernel in kernels if kernel is not None]
    stored, laid = sharding.STORED["expert_embed"], jax.typeof(given[0]).sharding.spec
    split = tuple(
        axis for axis in stored if sharding.axis_size(axis) > 1 and stored in laid
    )  # no axis with ZeRO-1

    def local(x, choice, weight, *given):
        # Gathered here and not before, so that gradients are scattered, and not summed whole on
        # every device.
        def gather(kernel, dim):
            return sharding.gather(kernel, split, dim) if split else kernel

        kernels = local_experts.Kernels(
            gather(given[0], 2), *(gather(kernel, 1) for kernel in given[1:])
        )
        if room is None:
            flat = (y.reshape(-1, y.shape[-1]) for y in (x, choice, weight))
            y = exchange.dropless(*flat, kernels, activation, devices, platform, kind).reshape(
                x.shape
            )
        else:
            y = exchange.limited(x, choice, weight, kernels, activation, devices, room)
        if scatter:
            return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y, "tensor") if tensor > 1 else y

    def on_device(x, *args):
        shape = (x.shape[0], x.shape[1] // (tensor if scatter else 1), x.shape[2])
        return exchange.all_manual(local, shape, x.dtype)(x, *args)

    rows = ("batch", "seq", None)
    with sharding.using_rules({"expert_embed": stored} if split else {}):
        axes = (rows, rows, rows, DOWN, *(UP,) * (len(given) - 1))
        return sharding.run_local(on_device, axes, ("batch", compute.stream, None))(
            x, choice, weight, *given
        )
