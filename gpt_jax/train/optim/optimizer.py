"""Makes one `optax.GradientTransformation` from `config.Optim`.

Parameters are a nested dict of float32 arrays. A path joins its keys with "/". Everything under
`blocks/` is stacked over layers, and its first axis is that of the layers. Each parameter belongs
to exactly one group, and each group has its own optimiser, rate and decay.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.train.optim import muon
from gpt_jax.train.optim.schedule import make_schedule

STACKED = "blocks/"

# The default Muon takes the matrices under these paths.
LAYERS = ("blocks/", "tail/")

# The dims of a parameter that Muon takes: one matrix, or one for each expert.
MATRICES = (2, 3)

# The path of a router's bias ends with this, see `steer`.
ROUTER_BIAS = "router/bias"


class GroupRow(NamedTuple):
    """One line of the table that a run prints before it starts."""

    group: str
    optimizer: str
    tensors: int
    parameters: int
    peak_rate: float
    weight_decay: float


def path_of(keys) -> str:
    """`blocks/0/attention/q/kernel` from the keys that `jax.tree_util` gives."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaf_dims(path: str, leaf) -> int:
    """How many dims a parameter has, without the layer axis of `blocks/`."""
    return leaf.ndim - path.startswith(STACKED)


def _leaves(params_like) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params_like)}


def groups_of(optim: config.Optim) -> dict[str, config.Group]:
    """Every group by label, in the order of `assign`'s indices.

    They are the groups of the config and the default. A default Muon also has an AdamW of the same
    rate, betas, eps and decay, which takes every parameter that is no matrix of a layer.
    """
    fallback = {"default": optim.optimizer}
    if optim.optimizer == "muon":
        fallback["default_adamw"] = "adamw"
    return {f"group{i}": group for i, group in enumerate(optim.groups)} | {
        label: config.Group(
            match=label,
            optimizer=optimizer,
            rate=1.0,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        for label, optimizer in fallback.items()
    }


def _patterns(optim: config.Optim) -> list[re.Pattern]:
    """The expression of each group. Raises UsageError if one is no regular expression."""
    compiled = []
    for i, group in enumerate(optim.groups):
        try:
            compiled.append(re.compile(group.match))
        except re.error as error:
            raise UsageError(
                f"config.optim.groups[{i}].match = {group.match!r}: not a regular expression: "
                f"{error}"
            ) from None
    return compiled


def _check_groups(optim: config.Optim, patterns, leaves, index) -> None:
    """Raises UsageError for a group without parameters, or a Muon group with a non-matrix."""
    for i, group in enumerate(optim.groups):
        field = f"config.optim.groups[{i}].match = {group.match!r}"
        if i not in index.values() and not group.optional:
            earlier = [index[path] for path in leaves if patterns[i].search(path)]
            if earlier:
                raise UsageError(
                    f"{field}: every parameter it finds is taken by "
                    f"config.optim.groups[{earlier[0]}]; put the narrower one first"
                )
            examples = ", ".join(list(leaves)[:4])
            raise UsageError(f"{field}: found in no parameter path; paths look like {examples}")

        if group.optimizer == "muon":
            for path, leaf in leaves.items():
                if index[path] == i and leaf_dims(path, leaf) not in MATRICES:
                    raise UsageError(
                        f"{field}: takes {path}, which is no matrix {leaf.shape}, and muon takes "
                        "matrices only; narrow the expression or put a group for it first"
                    )


def assign(optim: config.Optim, params_like) -> dict[str, int]:
    """Path -> index of its group, for every parameter except the routers' biases (see `steer`).

    A parameter belongs to the first of `optim.groups` whose `match` is found in its path. All
    others belong to the default, index `len(optim.groups)`. A default Muon keeps only the matrices
    inside layers and their experts. Embeddings, head, norms, biases and scalars then go to AdamW,
    index `len(optim.groups) + 1`.

    `params_like` are arrays or ShapeDtypeStructs. Raises UsageError, which names the group's field,
    if an expression is invalid, a group takes no parameter, or a Muon group takes a non-matrix.
    """
    patterns = _patterns(optim)
    default = len(optim.groups)
    leaves = {
        path: leaf for path, leaf in _leaves(params_like).items() if not path.endswith(ROUTER_BIAS)
    }

    def index_of(path, leaf):
        for i, pattern in enumerate(patterns):
            if pattern.search(path):
                return i
        matrix = path.startswith(LAYERS) and leaf_dims(path, leaf) in MATRICES
        return default + (optim.optimizer == "muon" and not matrix)

    index = {path: index_of(path, leaf) for path, leaf in leaves.items()}
    _check_groups(optim, patterns, leaves, index)
    return index


def describe_groups(
    optim: config.Optim, params_like, balance_rate: float = config.Model.balance_rate
) -> list[GroupRow]:
    """One row for every group that has parameters.

    A stack of layers counts as one tensor. The decay is the group's knob, and `optim.decay` decides
    which of its tensors decay.
    """
    index = assign(optim, params_like)
    leaves = _leaves(params_like)

    def sizes_of(i):
        return [math.prod(leaf.shape) for path, leaf in leaves.items() if index.get(path) == i]

    rows = []
    for i, (label, group) in enumerate(groups_of(optim).items()):
        sizes = sizes_of(i)
        if sizes:
            name = f"{label} {group.match}" if i < len(optim.groups) else label
            rows.append(
                GroupRow(
                    name,
                    group.optimizer,
                    len(sizes),
                    sum(sizes),
                    optim.learning_rate * group.rate,
                    group.weight_decay,
                )
            )

    biases = sizes_of(None)
    if biases:
        rows.append(GroupRow(ROUTER_BIAS, "sign", len(biases), sum(biases), balance_rate, 0.0))
    return rows


def _by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on stacks, once for each layer, so that its statistics do not mix layers."""

    def init(params):
        if not jax.tree.leaves(params):
            return tx.init(params)
        # Zeros do not inherit the layout of the layers, so it is stated.
        return sharding.over_stages(jax.vmap(tx.init)(params))

    def update(updates, state, params):
        if not jax.tree.leaves(updates):
            return tx.update(updates, state, params)
        return jax.vmap(tx.update)(updates, state, params)

    return optax.GradientTransformation(init, update)


def _stacking(tree):
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "stacked" if path_of(keys).startswith(STACKED) else "single", tree
    )


def _decay(optim: config.Optim, group: config.Group) -> optax.GradientTransformation:
    least = {"matrices": 2, "all": 0}[optim.decay]

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda keys, p: leaf_dims(path_of(keys), p) >= least, params
        )

    return optax.add_decayed_weights(group.weight_decay, mask)


def _adamw(optim, group, dtype):
    return optax.chain(optax.scale_by_adam(group.b1, group.b2, group.eps), _decay(optim, group))


def _adafactor(optim, group, dtype):
    # It is built from parts, because optax.adafactor does not multiply the decay by the learning
    # rate.
    rule = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return optax.chain(
        optax.partition({"single": rule, "stacked": _by_layer(rule)}, _stacking),
        _decay(optim, group),
    )


def _lion(optim, group, dtype):
    return optax.chain(optax.scale_by_lion(group.b1, group.b2), _decay(optim, group))


def _sgd(optim, group, dtype):
    momentum = optax.trace(group.b1) if group.b1 else optax.identity()
    return optax.chain(momentum, _decay(optim, group))


# Each row makes a group's step before the learning rate: (optim, group, dtype) -> transformation.
OPTIMIZERS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
    "muon": muon.make_muon,
}


def steer(balance_rate: float) -> optax.GradientTransformation:
    """The rule of a router's bias: a step of `balance_rate` against the sign of its gradient.

    That gradient tells how far each expert is above its share. The rule has neither decay nor
    schedule (Wang et al. 2024, arXiv:2408.15664).
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: -balance_rate * jnp.sign(g), updates)
    )


def gradient_norm(grads) -> jax.Array:
    """The norm over all gradients except those of the routers' biases."""
    return optax.tree.norm(
        [leaf for path, leaf in _leaves(grads).items() if not path.endswith(ROUTER_BIAS)]
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients times min(1, limit / (norm + 1e-6)), with the norm of `gradient_norm`.

    This is the formula of torch's `clip_grad_norm_`. The optax function lacks the 1e-6, which
    makes a difference when the limit is small.
    """

    def clip(updates, params):
        factor = jnp.minimum(1.0, limit / (gradient_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clip)


def make_optimizer(
    optim: config.Optim,
    params_like,
    dtype=jnp.float32,
    balance_rate: float = config.Model.balance_rate,
) -> optax.GradientTransformation:
    """The whole optimiser: clipping over all gradients, then each group's own rule, decay and rate.

    A group's rate at a step is `learning_rate * group.rate * make_schedule(optim)(step)`, and the
    first update is step 0. Weight decay is decoupled and multiplied by that rate for every
    optimiser, as in torch's AdamW. Each optimiser reads these knobs:

    - adamw: b1, b2, and eps, which is outside the root.
    - lion: b1, b2.
    - sgd: b1, which is torch's momentum without dampening.
    - muon: see `muon.make_muon`.
    - adafactor: none. It has no momentum, and its second moment is 1 - step^-0.8. Its rate is
      relative to the root mean square of each parameter, layer by layer (arXiv 1804.04235). So a
      rate of 1e-2 is usual.

    `params_like` gives paths and shapes. Muon orthogonalises matrices in `dtype`. `balance_rate` is
    the step of the routers' biases (`steer`). State arrays are sharded like the parameters, also
    under `jit(tx.init)`. Raises UsageError if groups or the schedule do not fit, see `assign` and
    `make_schedule`.
    """
    index = assign(optim, params_like)
    groups = groups_of(optim)
    schedule = make_schedule(optim)
    names = dict(enumerate(groups)) | {None: ROUTER_BIAS}
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: names[index.get(path_of(keys))], params_like
    )

    def make_group(group):
        def rate(step):
            return optim.learning_rate * group.rate * schedule(step)

        return optax.chain(
            OPTIMIZERS[group.optimizer](optim, group, dtype),
            optax.scale_by_learning_rate(rate),
        )

    used = {
        name: make_group(group)
        for i, (name, group) in enumerate(groups.items())
        if i in index.values()
    }
    if ROUTER_BIAS in jax.tree.leaves(labels):
        used[ROUTER_BIAS] = steer(balance_rate)
    return optax.chain(
        clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
        optax.partition(used, labels),
    )


def make_zero1(
    tx: optax.GradientTransformation, split: Callable, whole: Callable
) -> optax.GradientTransformation:
    """`tx` by ZeRO-1 (Rajbhandari et al. 2020).

    Its state and its work are on `split` parameters and gradients, and `whole` lays out its
    updates. Both functions take a tree shaped like the parameters.
    """

    def update(grads, state, params):
        updates, state = tx.update(split(grads), state, split(params))
        return whole(updates), state

    return optax.GradientTransformation(lambda params: tx.init(split(params)), update)


def ema_init(params):
    """Averaged weights at the start: a copy of `params`, so that both can be donated."""
    return jax.tree.map(jnp.copy, params)


def ema_update(ema, params, decay: float):
    """`decay * ema + (1 - decay) * params`, leaf by leaf, float32."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
