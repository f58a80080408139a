"""The mixture-of-experts feed-forward: router, balance and statistics.

Every token is sent to the k experts with its highest scores (Shazeer et al. 2017, arXiv:1701.06538)
and gets the weighted sum of their outputs. Shared experts, which all tokens go through, add to it
(Dai et al. 2024, arXiv:2401.06066).

Parameter paths are API: router/kernel [D, E], router/bias [E] (balance "bias"),
experts/{up,gate}/kernel [E, D, F], experts/down/kernel [E, F, D], and shared/… as in mlp.Mlp.
Experts have no biases.

Shapes: B batch, T sequence, D embed, F mlp, E experts, k choices.
"""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.model.experts import exchange, local_experts
from gpt_jax.model.layers.mlp import FFNS, Mlp
from gpt_jax.model.parametrization import make_init


def _sigmoid(logits, axis=-1):
    return jax.nn.sigmoid(logits)


ROUTERS = {"softmax": jax.nn.softmax, "sigmoid": _sigmoid}

# The kernels' logical axes.
UP = ("experts", "expert_embed", "mlp")
DOWN = ("experts", "mlp", "expert_embed")


class Moe(nn.Module):
    """x [B, T, D] -> (y [B, T, D], the statistics of `make_stats`).

    `segment` is [B, T] or None. No expert takes the padding, which is segment 0.
    """

    model: config.Model
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, x, segment):
        model = self.model
        x = sharding.constrain(x, "batch", "seq", None)
        logits, bias = Router(model, name="router")(x)
        choice, weight, scores = route(model, logits, bias)
        is_real = jnp.ones_like(choice[..., 0], bool) if segment is None else segment != 0

        room = None
        if model.dispatch == "capacity":
            room = exchange.capacity(
                x.shape[1], model.experts, model.experts_per_token, model.capacity_factor
            )
        stats = make_stats(model, logits, scores, choice, is_real, bias, room)

        kernels = Experts(model, name="experts")(x.shape[-1])
        choice = jnp.where(is_real[..., None], choice, model.experts)
        y = dispatch(model, self.compute, x, choice, weight, kernels, room)
        if model.shared_experts:
            wide = replace(model, mlp=model.shared_experts * model.expert_mlp)
            y = y + Mlp(model.expert_ffn, wide, self.compute, name="shared")(x)
        return y, stats


class Router(nn.Module):
    """x [B, T, D] -> (logits [B, T, E], bias [E] or None).

    Both are in float32 whatever the compute dtype (Fedus et al. 2021).
    """

    model: config.Model

    @nn.compact
    def __call__(self, x):
        model = self.model
        axes = ("embed", None)
        init = sharding.stored_init(make_init("router", model), axes)
        kernel = self.param("kernel", init, (x.shape[-1], model.experts))
        logits = jnp.matmul(
            x.astype(jnp.float32),
            sharding.use_weight(kernel, axes, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=sharding.out_spec("batch", "seq", None),
        )
        if model.balance != "bias":
            return logits, None

        zeros = sharding.stored_init(nn.initializers.zeros, (None,))
        return logits, self.param("bias", zeros, (model.experts,))


def route(model: config.Model, logits: jax.Array, bias: jax.Array | None):
    """Chooses experts -> (choice [B, T, k], weight [B, T, k] of their outputs, scores [B, T, E]).

    The best expert comes first, and the lower one at a tie. The bias takes part in the choice
    alone (Wang et al. 2024, arXiv:2408.15664).
    """
    scores = ROUTERS[model.router](logits, axis=-1)
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    choice = jax.lax.top_k(ranked, model.experts_per_token)[1]

    # A gather is refused along rows that are cut, so the weight is a masked sum.
    is_chosen = choice[..., None] == jnp.arange(model.experts)
    weight = jnp.where(is_chosen, scores[:, :, None], 0).sum(-1)
    if model.router_normalize:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return choice, weight, scores


def make_stats(
    model: config.Model, logits, scores, choice, is_real, bias, room
) -> dict[str, jax.Array]:
    """Sums statistics over each row's real tokens, in float32. All but `load` are [B].

    - `load` [B, E] counts choices by expert.
    - `dropped` counts choices beyond the capacity `room`.
    - `router_z` sums logsumexp(logits)^2 (Zoph et al. 2022, arXiv:2202.08906).
    - `balance` is the loss of the Switch Transformer within the row, times the row's tokens (Fedus
      et al. 2021, arXiv:2101.03961). The loss is E times a sum over experts: the expert's part of
      the choices times its mean probability. It is 1 where all experts are equal.
    - `steer` exists with a router bias. It is 0, and its gradient for the bias is E * load -
      choices. This tells how far each expert is above its share, times E. Sums over rows are
      therefore sums of integers, and exact. The caller adds it to the objective, and the optimiser
      takes the gradient's sign (train/optim/).
    """
    mask = is_real.astype(jnp.float32)[..., None]
    is_chosen = (choice[..., None] == jnp.arange(model.experts)).sum(2)
    load = (is_chosen * mask).sum(1)
    total = load.sum(-1, keepdims=True)
    probability = ((scores / (scores.sum(-1, keepdims=True) + 1e-20)) * mask).sum(1)

    dropped = jnp.zeros_like(load[:, 0])
    if room is not None:
        dropped = jnp.maximum(load - room, 0).sum(-1)
    stats = {
        "load": load,
        "router_z": (jax.nn.logsumexp(logits, axis=-1) ** 2 * mask[..., 0]).sum(1),
        "balance": model.experts * (load / jnp.maximum(total, 1) * probability).sum(-1),
        "dropped": dropped,
    }

    if bias is not None:
        excess = model.experts * load - total
        stats["steer"] = ((bias - jax.lax.stop_gradient(bias)) * excess).sum(-1)
    return stats


class Experts(nn.Module):
    """The experts' matrices, in float32 and laid out as they are stored."""

    model: config.Model

    @nn.compact
    def __call__(self, width: int) -> local_experts.Kernels:
        model = self.model
        _, is_gated = FFNS[model.expert_ffn]
        names = ("up", "gate") if is_gated else ("up",)
        down = Stack(model, DOWN, "mlp_out", name="down")((model.experts, model.expert_mlp, width))
        shape = (model.experts, width, model.expert_mlp)
        first = [Stack(model, UP, "mlp_in", name=name)(shape) for name in names]
        return local_experts.Kernels(down, *first)


class Stack(nn.Module):
    """A kernel [E, in, out]. Each of its matrices starts like one of a dense layer."""

    model: config.Model
    axes: tuple[str, str, str]
    role: str

    @nn.compact
    def __call__(self, shape):
        init_one = make_init(self.role, self.model)

        def init(key, shape, dtype=jnp.float32):
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda key: init_one(key, shape[1:], dtype))(keys)

        return self.param("kernel", sharding.stored_init(init, self.axes), shape)


# ---- dispatch ----


def dispatch(
    model: config.Model,
    compute: config.Compute,
    x,
    choice,
    weight,
    kernels: local_experts.Kernels,
    room: int | None,
):
    """Sends x [B, T, D] through its experts, summed with `weight` [B, T, k] -> [B, T, D].

    `choice` [B, T, k] are experts 0 … E - 1, and E stands for none. An expert takes `room` choices
    from a row, and all where `room` is None. The result is laid out as the stream.

    The kernels enter in the dtype in which devices sum their gradients.
    """
    tensor = sharding.axis_size("tensor")
    scatters = sharding.count_parts(compute.stream) > sharding.count_parts("seq")
    wide = jnp.dtype(compute.gradient_dtype)
    cast = [kernel.astype(wide) for kernel in kernels if kernel is not None]
    split = _find_split(cast[0])
    compute_choices = _make_compute_choices(model, compute, room)

    def run(x, choice, weight, *kernels):
        y = compute_choices(x, choice, weight, _gather_kernels(kernels, split, x.dtype))
        if scatters:
            return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y, "tensor") if tensor > 1 else y

    def run_on_device(x, *args):
        length = x.shape[1] // (tensor if scatters else 1)
        shape = (x.shape[0], length, x.shape[2])
        return exchange.all_manual(run, shape, x.dtype)(x, *args)

    rows = ("batch", "seq", None)
    own_rules = {"expert_embed": sharding.STORED["expert_embed"]} if split else {}
    with sharding.using_rules(own_rules):
        axes = (rows, rows, rows, DOWN, *[UP] * (len(cast) - 1))
        mapped = sharding.run_local(run_on_device, axes, ("batch", compute.stream, None))
        return mapped(x, choice, weight, *cast)


def _make_compute_choices(model: config.Model, compute: config.Compute, room: int | None):
    """Makes the function of (x, choice, weight, kernels) that runs on each device's own shard.

    Raises UsageError if the platform has no such matmul of experts as `compute` asks for.
    """
    activation = FFNS[model.expert_ffn][0]
    devices = sharding.axis_size("expert")

    if room is not None:

        def compute_limited(x, choice, weight, kernels):
            return exchange.limited(x, choice, weight, kernels, activation, devices, room)

        return compute_limited

    habits = sharding.habits()
    habits = config.choose_expert_matmul(compute.expert_matmul, habits, habits.name)

    def compute_all(x, choice, weight, kernels):
        def flatten(array):
            return array.reshape(-1, array.shape[-1])

        y = exchange.dropless(
            flatten(x),
            flatten(choice),
            flatten(weight),
            kernels,
            activation,
            devices,
            habits,
        )
        return y.reshape(x.shape)

    return compute_all


def _find_split(kernel) -> tuple[str, ...]:
    """Finds the mesh axes over which the experts' embed dim is cut. ZeRO-1 cuts it over none."""
    stored = sharding.STORED["expert_embed"]
    laid_out = jax.typeof(kernel).sharding.spec
    return tuple(axis for axis in stored if sharding.axis_size(axis) > 1 and stored in laid_out)


def _gather_kernels(kernels, split: tuple[str, ...], dtype) -> local_experts.Kernels:
    """Gathers the embed dims of this device's experts, sent in `dtype`.

    This happens inside the device's function and not before it. Gradients are therefore scattered,
    and not summed whole on every device.
    """
    if not split:
        return local_experts.Kernels(*kernels)

    def gather(kernel, dim):
        move = partial(sharding.gather, names=split, dim=dim)
        return sharding.send_narrow(move, kernel, dtype, kernel.dtype)

    down, *first = kernels
    return local_experts.Kernels(gather(down, 2), *(gather(kernel, 1) for kernel in first))
