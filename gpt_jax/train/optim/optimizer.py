"""Makes one `optax.GradientTransformation` from `config.Optim`.

Parameters are a nested dict of float32 arrays. A path joins its keys with "/". Each parameter
belongs to exactly one group, and each group has its own optimiser, rate and decay (groups.py).
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax import config, sharding
from gpt_jax.train.optim import muon
from gpt_jax.train.optim.groups import (
    FROZEN_GROUP,
    STEERED,
    STEERED_GROUP,
    Describe,
    assign,
    groups_of,
    leaf_dims,
    leaves_by_path,
)
from gpt_jax.train.optim.schedule import make_schedule


def _by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on stacks, once for each layer, so that its statistics do not mix layers."""

    def init(params):
        if not jax.tree.leaves(params):
            return tx.init(params)
        # Zeros do not inherit the layout of the layers, so it is stated.
        return sharding.over_stages(jax.vmap(tx.init)(params))

    def update(updates, state, params=None):
        if not jax.tree.leaves(updates):
            return tx.update(updates, state, params)
        return jax.vmap(tx.update)(updates, state, params)

    return optax.GradientTransformation(init, update)


def _decay(
    optim: config.Optim, group: config.Group, describe: Describe
) -> optax.GradientTransformation:
    least = {"matrices": 2, "all": 0}[optim.decay]

    def decays(keys, param) -> bool:
        return leaf_dims(param, describe(sharding.join_path(keys))) >= least

    return optax.add_decayed_weights(
        group.weight_decay, lambda params: jax.tree_util.tree_map_with_path(decays, params)
    )


def _adamw(optim, group, describe, dtype):
    adam = optax.scale_by_adam(group.b1, group.b2, group.eps, mu_dtype=optim.moment_dtype)
    return optax.chain(adam, _decay(optim, group, describe))


def _adafactor(optim, group, describe, dtype):
    # It is built from parts, because optax.adafactor does not multiply the decay by the learning
    # rate.
    rule = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def label(keys, _) -> str:
        return "stacked" if describe(sharding.join_path(keys)).stacked else "single"

    return optax.chain(
        optax.partition(
            {"single": rule, "stacked": _by_layer(rule)},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        ),
        _decay(optim, group, describe),
    )


def _lion(optim, group, describe, dtype):
    lion = optax.scale_by_lion(group.b1, group.b2, mu_dtype=optim.moment_dtype)
    return optax.chain(lion, _decay(optim, group, describe))


def _sgd(optim, group, describe, dtype):
    momentum = optax.trace(group.b1) if group.b1 else optax.identity()
    return optax.chain(momentum, _decay(optim, group, describe))


def _muon(optim, group, describe, dtype):
    return muon.make_muon(optim, group, dtype)


# Each row makes a group's step before the learning rate:
# (optim, group, describe, dtype) -> transformation. The knobs that they read:
#
# - adamw has b1, b2, moment_dtype, and eps, which is outside the root.
# - lion has b1, b2 and moment_dtype.
# - sgd has b1, which is torch's momentum without dampening.
# - muon has those of `muon.make_muon`.
# - adafactor has none. It has no momentum, and its second moment is 1 - step^-0.8. Its rate is
#   relative to the root mean square of each parameter, layer by layer (arXiv 1804.04235). So a
#   rate of 1e-2 is usual.
OPTIMIZERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
    "muon": _muon,
}


def steer(balance_rate: float) -> optax.GradientTransformation:
    """The rule of a router's bias: a step of `balance_rate` against the sign of its gradient.

    That gradient tells how far each expert is above its share. The rule has neither decay nor
    schedule (Wang et al. 2024, arXiv:2408.15664).
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: -balance_rate * jnp.sign(g), updates)
    )


def stay(updates, params):
    """Updates that change no bit. A weight of -0 would become 0 if 0 were added to it."""
    return jax.tree.map(lambda g: jnp.full_like(g, -0.0), updates)


def scale_layers(rates: Mapping[str, Any]) -> optax.GradientTransformation:
    """Multiplies the update of the parameter at each path by its rate.

    A rate is a number, or an array with an entry for each layer of a stack.
    """

    def scale(keys, update):
        rate = np.asarray(rates[sharding.join_path(keys)], np.float32)
        if not rate.ndim:
            return update * rate
        factors = jnp.asarray(rate.reshape(-1, *[1] * (update.ndim - 1)))
        return update * sharding.over_stages(factors)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def add_layer_rates(
    tx: optax.GradientTransformation, rates: Mapping[str, Any]
) -> optax.GradientTransformation:
    """`tx` with its updates scaled as by `scale_layers`."""
    return optax.chain(tx, scale_layers(rates))


def gradient_norm(grads, describe: Describe) -> jax.Array:
    """The norm over all gradients except those of the routers' biases."""
    return optax.tree.norm(
        [leaf for path, leaf in leaves_by_path(grads).items() if describe(path).role != STEERED]
    )


def clip_by_global_norm(limit: float, describe: Describe) -> optax.GradientTransformation:
    """Gradients times min(1, limit / (norm + 1e-6)), with the norm of `gradient_norm`.

    This is the formula of torch's `clip_grad_norm_`. The optax function lacks the 1e-6, which
    makes a difference when the limit is small.
    """

    def clip(updates, params):
        factor = jnp.minimum(1.0, limit / (gradient_norm(updates, describe) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def _label_leaves(params_like, index: dict, names: list, frozen: Collection[str]):
    """Names the group of each parameter. `index` gives the group's number by path."""

    def label(keys, _):
        path = sharding.join_path(keys)
        if path in frozen:
            return FROZEN_GROUP
        number = index.get(path)
        return STEERED_GROUP if number is None else names[number]

    return jax.tree_util.tree_map_with_path(label, params_like)


def make_optimizer(
    optim: config.Optim,
    params_like,
    describe: Describe,
    dtype=jnp.float32,
    balance_rate: float = config.Model.balance_rate,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """The whole optimiser: clipping over all gradients, then each group's own rule, decay and rate.

    A group's rate at a step is `learning_rate * group.rate * make_schedule(optim)(step)`, and the
    first update is step 0. Weight decay is decoupled and multiplied by that rate for every
    optimiser, as in torch's AdamW.

    `params_like` gives paths and shapes, and `describe` tells what lies at a path. Muon
    orthogonalises matrices in `dtype`. `balance_rate` is the step of the routers' biases (`steer`).
    The parameters at the paths `frozen` stay as they are.
    State arrays are sharded like the parameters, also under `jit(tx.init)`. Raises UsageError if
    groups or the schedule do not fit, see `groups.assign` and `make_schedule`.
    """
    index = assign(optim, params_like, describe, frozen)
    groups = groups_of(optim)
    schedule = make_schedule(optim)
    labels = _label_leaves(params_like, index, list(groups), frozen)

    def make_group(group):
        def rate(step):
            return optim.learning_rate * group.rate * schedule(step)

        return optax.chain(
            OPTIMIZERS[group.optimizer](optim, group, describe, dtype),
            optax.scale_by_learning_rate(rate),
        )

    used: dict[Hashable, optax.GradientTransformation] = {
        name: make_group(group)
        for i, (name, group) in enumerate(groups.items())
        if i in index.values()
    }
    if STEERED_GROUP in jax.tree.leaves(labels):
        used[STEERED_GROUP] = steer(balance_rate)
    if frozen:
        used[FROZEN_GROUP] = optax.stateless(stay)
    return optax.chain(
        clip_by_global_norm(optim.clip, describe) if optim.clip else optax.identity(),
        optax.partition(used, labels),
    )


def make_zero1(
    tx: optax.GradientTransformation, split: Callable, whole: Callable
) -> optax.GradientTransformation:
    """`tx` by ZeRO-1 (Rajbhandari et al. 2020).

    Its state and its work are on `split` parameters and gradients, and `whole` lays out its
    updates. Both functions take a tree shaped like the parameters.
    """

    def update(updates, state, params=None):
        updates, state = tx.update(split(updates), state, split(params))
        return whole(updates), state

    return optax.GradientTransformation(lambda params: tx.init(split(params)), update)


# States whose count is the place in a schedule. Other counts belong to moments, such as Adam's.
SCHEDULED = (optax.ScaleByScheduleState, muon.MuonState, muon.DecayState)


def rewind(state):
    """The state of an optimiser whose schedules begin anew. Its moments stay."""

    def is_scheduled(node) -> bool:
        return isinstance(node, SCHEDULED)

    def begin(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_scheduled(node) else node

    return jax.tree.map(begin, state, is_leaf=is_scheduled)


def ema_init(params):
    """Averaged weights at the start: a copy of `params`, so that both can be donated."""
    return jax.tree.map(jnp.copy, params)


def ema_decay(train: config.Train, step: jax.Array) -> jax.Array | float:
    """The decay of averaged weights after `step` updates.

    With a warmup the average forgets the first weights as TensorFlow's `num_updates` does it.
    """
    if not train.ema_warmup:
        return train.ema
    return jnp.minimum(train.ema, (1.0 + step) / (10.0 + step))


def ema_update(ema, params, decay: jax.Array | float):
    """`decay * ema + (1 - decay) * params`, leaf by leaf, float32."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
