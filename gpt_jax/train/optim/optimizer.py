"""From `config.Optim` to one `optax.GradientTransformation` (floor 2; called by experiment.py).

Parameters are a nested dict of float32 arrays; a path joins its keys with "/". Everything under
`blocks/` is stacked over layers: its first axis does not count as its own. Each parameter belongs
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
LAYERS = ("blocks/", "tail/")  # where the default Muon finds its matrices
MATRICES = (2, 3)  # dims of what Muon takes: a matrix, or one for each expert
ROUTER_BIAS = "router/bias"  # where the path of one ends, see `steer`


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
    """How many dims a parameter has of its own: the layer axis of `blocks/` is not counted."""
    return leaf.ndim - path.startswith(STACKED)


def _leaves(params_like) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params_like)}


def groups_of(optim: config.Optim) -> dict[str, config.Group]:
    """Every group by label, in the order of `assign`'s indices: those of the config, the
    default, and for a default Muon the AdamW that takes what is no matrix of a layer, with the
    same rate, betas, eps and decay."""
    fallback = {"default": optim.optimizer} | (
        {"default_adamw": "adamw"} if optim.optimizer == "muon" else {}
    )
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
    for i, group in enumerate(optim.groups):
        field = f"config.optim.groups[{i}].match = {group.match!r}"
        if i not in index.values() and not group.optional:
            earlier = [index[path] for path in leaves if patterns[i].search(path)]
            raise UsageError(
                f"{field}: every parameter it finds is taken by config.optim.groups[{earlier[0]}]; put "
                "the narrower one first"
                if earlier
                else f"{field}: found in no parameter path; paths look like {', '.join(list(leaves)[:4])}"
            )
        if group.optimizer == "muon":
            for path, leaf in leaves.items():
                if index[path] == i and leaf_dims(path, leaf) not in MATRICES:
                    raise UsageError(
                        f"{field}: takes {path}, which is no matrix {leaf.shape}, and muon takes matrices "
                        "only; narrow the expression or put a group for it first"
                    )


def assign(optim: config.Optim, params_like) -> dict[str, int]:
    """Path -> index of its group, for every parameter but the routers' biases (see `steer`): the
    first of `optim.groups` whose `match` is found in the path; else the default, index
    `len(optim.groups)`. When the default is Muon it keeps the matrices inside layers, each expert's
    too, and embeddings, head, norms, biases and scalars go to AdamW, index `len(optim.groups) + 1`.

    `params_like`: arrays or ShapeDtypeStructs. Raises UsageError, naming the group's field, for
    an expression that is none, for a group that takes no parameter, and for a Muon group that
    takes something that is no matrix."""
    patterns, default = _patterns(optim), len(optim.groups)
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
    """One row for every group that has parameters; tensors count a stack of layers as one, decay
    is the knob's value (which leaves it touches is `optim.decay`'s matter)."""
    index, leaves = assign(optim, params_like), _leaves(params_like)

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
    own = (
        [GroupRow(ROUTER_BIAS, "sign", len(biases), sum(biases), balance_rate, 0.0)]
        if biases
        else []
    )
    return rows + own


def _by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on stacks, once for each layer: its statistics do not mix layers."""

    def init(params):
        if not jax.tree.leaves(params):
            return tx.init(params)
        return sharding.over_stages(
            jax.vmap(tx.init)(params)
        )  # zeros do not inherit the layout of the layers

    def update(updates, state, params):
        return (jax.vmap(tx.update) if jax.tree.leaves(updates) else tx.update)(
            updates, state, params
        )

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
    # Built from parts: the ready-made one does not multiply the decay by the learning rate.
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
    """The rule of a router's bias: a step of `balance_rate` against the sign of its gradient,
    which says how far each expert is above its share (model/moe.py). No decay, no schedule (Wang
    et al. 2024, arXiv:2408.15664)."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: -balance_rate * jnp.sign(g), updates)
    )


def gradient_norm(grads) -> jax.Array:
    """The norm over all gradients; the routers' biases have none."""
    return optax.tree.norm(
        [leaf for path, leaf in _leaves(grads).items() if not path.endswith(ROUTER_BIAS)]
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients times min(1, limit / (norm + 1e-6)), norm over all of them (`gradient_norm`):
    torch's `clip_grad_norm_` to the letter (the library's own lacks the 1e-6, which shows when
    the limit is small)."""

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

    A group's rate at a step is `learning_rate * group.rate * make_schedule(optim)(step)`, step 0
    for the first update. Weight decay is decoupled and multiplied by that rate for every optimiser
    (torch's AdamW). Knobs by optimiser: adamw: b1, b2, eps (outside the root). lion: b1, b2. sgd:
    b1, the momentum (torch's, without dampening). muon: see muon.py. adafactor: none (no momentum,
    second moment 1 - step^-0.8); its rate is relative to the root mean square of each parameter,
    layer by layer (arXiv 1804.04235), so 1e-2 is usual.

    `params_like` gives paths and shapes; `dtype` is Muon's: in which matrices are orthogonalised
    (muon.scale_by_muon). `balance_rate` is the step of the routers' biases (`steer`). State
    arrays are sharded like the parameters, also under `jit(tx.init)`. Raises what `assign` and
    `make_schedule` raise."""
    index, groups, schedule = assign(optim, params_like), groups_of(optim), make_schedule(optim)
    names = dict(enumerate(groups)) | {None: ROUTER_BIAS}
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: names[index.get(path_of(keys))], params_like
    )

    def make_group(group):
        return optax.chain(
            OPTIMIZERS[group.optimizer](optim, group, dtype),
            optax.scale_by_learning_rate(
                lambda step: optim.learning_rate * group.rate * schedule(step)
            ),
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
    """`tx` with its state, and its work, on `split` parameters and gradients, and its updates
    `whole` again: ZeRO-1 (Rajbhandari et al. 2020). Both functions lay out a tree shaped like
    the parameters."""

    def update(grads, state, params):
        updates, state = tx.update(split(grads), state, split(params))
        return whole(updates), state

    return optax.GradientTransformation(lambda params: tx.init(split(params)), update)


def ema_init(params):
    """Averaged weights at the start: a copy of `params` (a copy, so that both may be donated)."""
    return jax.tree.map(jnp.copy, params)


def ema_update(ema, params, decay: float):
    """`decay * ema + (1 - decay) * params`, leaf by leaf, float32."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
