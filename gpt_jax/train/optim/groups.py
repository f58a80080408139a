"""The groups of an optimiser: which parameters each takes, and how that is printed.

What a parameter is comes from the model, as `describe(path)`, see `Traits`. No path is matched
here, except by the regular expressions of the user's own groups.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import jax

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError

# What the default Muon takes: the matrices of the layers.
MUON_ROLES = ("matrix", "expert", "router", "gate")

# The dims of a parameter that Muon takes: one matrix, or one for each expert.
MATRICES = (2, 3)

# The role of a bias that no gradient moves, see `steer` in optimizer.py.
STEERED = "router_bias"

# The name of their group.
STEERED_GROUP = "router/bias"

# The name of the group of what stays as it is.
FROZEN_GROUP = "frozen"


class Traits(Protocol):
    """What an optimiser asks about a parameter.

    `role` says what is done with it, for instance "matrix" or "norm". If it is `stacked`, its first
    axis counts layers. The table of the transformer is gpt_jax/model/parameters.py.
    """

    @property
    def role(self) -> str: ...

    @property
    def stacked(self) -> bool: ...


# The traits of the parameter at a path such as `blocks/0/attention/q/kernel`.
Describe = Callable[[str], Traits]


class GroupRow(NamedTuple):
    """One line of the table that a run prints before it starts."""

    group: str
    optimizer: str
    tensors: int
    parameters: int
    peak_rate: float
    weight_decay: float


def leaf_dims(leaf, traits: Traits) -> int:
    """How many dims a parameter has, without the axis of the layers."""
    return leaf.ndim - traits.stacked


def leaves_by_path(params_like) -> dict[str, Any]:
    return {
        sharding.join_path(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params_like)
    }


def groups_of(optim: config.Optim) -> dict[str, config.Group]:
    """Every group by label, in the order of `assign`'s indices.

    They are the groups of the config and the default. A default Muon also has an AdamW with the
    same numbers, which takes every parameter that is no matrix of a layer.
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


def _check_groups(
    optim: config.Optim, patterns, leaves, index, describe: Describe, frozen: Collection[str]
) -> None:
    """Raises UsageError for a group without parameters, or a Muon group with a non-matrix.

    A group may have `frozen` parameters alone.
    """
    for i, group in enumerate(optim.groups):
        field = f"config.optim.groups[{i}].match = {group.match!r}"
        has_frozen = any(map(patterns[i].search, frozen))
        if i not in index.values() and not group.optional and not has_frozen:
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
                if index[path] == i and leaf_dims(leaf, describe(path)) not in MATRICES:
                    raise UsageError(
                        f"{field}: takes {path}, which is no matrix {leaf.shape}, and muon takes "
                        "matrices only; narrow the expression or put a group for it first"
                    )


def assign(
    optim: config.Optim, params_like, describe: Describe, frozen: Collection[str] = ()
) -> dict[str, int]:
    """Path -> index of its group, for every parameter except the routers' biases.

    What is `frozen` has none either.

    A parameter belongs to the first of `optim.groups` whose `match` is found in its path. All
    others belong to the default, index `len(optim.groups)`. A default Muon keeps only the roles
    `MUON_ROLES`. Embeddings, head, norms, biases and scalars then go to AdamW, index
    `len(optim.groups) + 1`.

    `params_like` are arrays or ShapeDtypeStructs. Raises UsageError, which names the group's field,
    if an expression is invalid, a group takes no parameter, or a Muon group takes a non-matrix.
    """
    patterns = _patterns(optim)
    default = len(optim.groups)
    leaves = {
        path: leaf
        for path, leaf in leaves_by_path(params_like).items()
        if describe(path).role != STEERED and path not in frozen
    }

    def index_of(path, leaf):
        for i, pattern in enumerate(patterns):
            if pattern.search(path):
                return i
        if optim.optimizer != "muon":
            return default

        traits = describe(path)
        is_matrix = traits.role in MUON_ROLES and leaf_dims(leaf, traits) in MATRICES
        return default if is_matrix else default + 1

    index = {path: index_of(path, leaf) for path, leaf in leaves.items()}
    _check_groups(optim, patterns, leaves, index, describe, frozen)
    return index


def describe_groups(
    optim: config.Optim,
    params_like,
    describe: Describe,
    balance_rate: float = config.Model.balance_rate,
    frozen: Collection[str] = (),
) -> list[GroupRow]:
    """One row for every group that has parameters.

    A stack of layers counts as one tensor. The decay is the group's knob, and `optim.decay` decides
    which of its tensors decay.
    """
    index = assign(optim, params_like, describe, frozen)
    leaves = leaves_by_path(params_like)

    def sizes_of(i):
        return [
            math.prod(leaf.shape)
            for path, leaf in leaves.items()
            if index.get(path) == i and path not in frozen
        ]

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
        rows.append(GroupRow(STEERED_GROUP, "sign", len(biases), sum(biases), balance_rate, 0.0))
    if frozen:
        sizes = [math.prod(leaves[path].shape) for path in frozen]
        rows.append(GroupRow(FROZEN_GROUP, "nothing", len(sizes), sum(sizes), 0.0, 0.0))
    return rows
