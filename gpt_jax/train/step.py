"""The train step and the eval step, as free functions of (state, batch)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt_jax import config, sharding
from gpt_jax.train.objectives import OBJECTIVES, Network
from gpt_jax.train.optim.optimizer import ema_decay, ema_init, ema_update, gradient_norm


class TrainState(NamedTuple):
    """The state of a training run, arrays only.

    `ema` is {} when averaging is off. No key is stored, because randomness comes from the run's
    seed and the step.
    """

    step: jax.Array  # updates done, int32
    params: Any
    opt: Any
    ema: Any


def init_state(params, tx: optax.GradientTransformation, train: config.Train) -> TrainState:
    """The state before the first update."""
    ema = ema_init(params) if train.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)


def _microbatches(batch: dict, count: int) -> dict:
    """Columns [B, …] -> [count, B / count, …].

    Microbatch a takes rows a, a + count, …, so that each device splits its own rows. Sums do not
    depend on which rows share a microbatch.
    """

    def split(x):
        x = sharding.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), "batch", None, "seq")
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split, batch)


def gradients(network: Network, params, frozen, batch: dict, key, train: config.Train):
    """(gradient of the weighted mean objective, Sums) over the batch.

    The gradient is that of `params`, and `frozen` has none. The batch is cut into
    `train.accumulate` microbatches. Their sums are added and divided once, so that the result is
    that of the whole batch whatever the masks are. Without a target it is 0.

    Devices sum the gradient of each microbatch. With `train.reduce_once` they sum that of the whole
    batch.
    """
    objective = OBJECTIVES[train.objective]

    def total(params, frozen, batch, key):
        whole = network.assemble(params, frozen)
        sums = objective(network, whole, frozen, batch, key, train)
        return sums["objective"][0], sums

    grad = jax.grad(total, has_aux=True)
    if train.accumulate == 1:
        grads, sums = grad(params, frozen, batch, key)
    else:
        add_up = partial(_add_microbatches, grad)
        if train.reduce_once:
            add_up = sharding.sum_over_copies(add_up)
        grads, sums = add_up(params, frozen, _microbatches(batch, train.accumulate), key)

    return divide_gradient(grads, sums["objective"][1]), sums


def _add_microbatches(grad: Callable, params, frozen, micro: dict, key):
    """Adds up what `grad` gives for each microbatch of the columns [count, B, …]."""

    def add(carry, x):
        index, columns = x
        grads = grad(params, frozen, columns, jax.random.fold_in(key, index))
        # Without the barrier libtpu 0.0.42 moves sums over devices behind this loop, and it
        # fails at that where the sums are sharded.
        return jax.tree.map(jnp.add, carry, jax.lax.optimization_barrier(grads)), None

    # The carry starts from zeros, because starting from the first microbatch would compile the
    # model a second time.
    first = jax.tree.map(lambda x: x[0], micro)
    _, sums = jax.eval_shape(grad, params, frozen, first, key)
    zeros = (
        jax.tree.map(jnp.zeros_like, params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
    )
    count = jax.tree.leaves(micro)[0].shape[0]
    return jax.lax.scan(add, zeros, (jnp.arange(count), micro))[0]


def divide_gradient(grads, weight):
    """The gradient of the mean, from that of the sum over targets of this weight.

    A batch without targets teaches nothing, so its gradient is 0. That holds also if the objective
    has terms that need no target, such as the balance of experts.
    """

    def divide(g):
        # 1e-9 keeps the branch that is not taken finite.
        return jnp.where(weight > 0, g / jnp.maximum(weight, 1e-9), 0)

    return jax.tree.map(divide, grads)


def train_step(
    state: TrainState,
    frozen,
    batch: dict,
    key,
    *,
    network: Network,
    tx: optax.GradientTransformation,
    train: config.Train,
):
    """(new state, Sums) of one update. The Sums include the norms of gradient and parameters.

    `key` is the run's key. The step is folded in here. `frozen` is for the objective, and
    {} if it wants nothing. It has no gradient and is no part of the state.
    """
    step_key = jax.random.fold_in(key, state.step)
    grads, sums = gradients(network, state.params, frozen, batch, step_key, train)

    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = {}
    if train.ema:
        ema = ema_update(state.ema, params, ema_decay(train, state.step))

    sums["grad_norm"] = (gradient_norm(grads, network.describe), jnp.ones(()))
    sums["param_norm"] = (optax.tree.norm(params), jnp.ones(()))
    return TrainState(state.step + 1, params, opt, ema), sums


def eval_step(params, frozen, batch: dict, *, network: Network, train: config.Train) -> dict:
    """Sums over a held-out batch, without dropout."""
    whole = network.assemble(params, frozen)
    return OBJECTIVES[train.objective](network, whole, frozen, batch, None, train)
