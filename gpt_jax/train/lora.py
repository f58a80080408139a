"""Adapters of low rank beside frozen weights (Hu et al. 2021, arXiv:2106.09685).

The learned parameters are a tree that has, at the path of each matrix with an adapter,

- `a` [..., in, R], drawn at random, and `b` [..., R, out], which starts from 0;
- `m` [..., out] of dora, which starts from the lengths of the matrix's columns.

R is the rank. The dims before belong to the matrix: the layers of a stack. The weights beneath are
frozen, and come as `frozen["base"]`.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.train.objectives import Network
from gpt_jax.train.optim.groups import Describe, leaves_by_path
from gpt_jax.train.targets import find_parameters

# The entry of the frozen trees that has the weights beneath the adapters.
BASE = "base"

# The role of all that is learned here.
ROLE = "adapter"

# The roles of the matrices that can have an adapter. The model applies it where it multiplies.
ADAPTABLE = ("matrix",)

FACTORS = frozenset(("a", "b"))


class Variant(NamedTuple):
    """A kind of adapter. `scale(alpha, rank)` multiplies the product of its factors."""

    scale: Callable[[float, int], float]
    has_lengths: bool  # whether the lengths of columns are learned by themselves


# The values of `lora.variant`. rslora: Kalajdzievski 2023, arXiv:2312.03732; dora: Liu et al. 2024,
# arXiv:2402.09353.
VARIANTS = {
    "lora": Variant(lambda alpha, rank: alpha / rank, False),
    "rslora": Variant(lambda alpha, rank: alpha / math.sqrt(rank), False),
    "dora": Variant(lambda alpha, rank: alpha / rank, True),
}


class Adapted(NamedTuple):
    """Parameters with adapters, as the model applies them: the weights are not merged."""

    params: Any
    adapters: Any


class Traits(NamedTuple):
    """What an optimiser asks about a parameter of an adapter."""

    role: str
    stacked: bool


def describe_adapters(describe: Describe) -> Describe:
    """The traits of the parameters of adapters. `describe` has those of the matrices beneath."""

    def describe_part(path: str) -> Traits:
        matrix, _, _ = path.rpartition("/")
        return Traits(ROLE, describe(matrix).stacked)

    return describe_part


def find_scale(lora: config.Lora) -> float:
    """What the product of an adapter's factors is multiplied by."""
    return VARIANTS[lora.variant].scale(lora.alpha, lora.rank)


def list_parts(lora: config.Lora) -> tuple[str, ...]:
    """The names of the arrays that an adapter consists of."""
    return ("a", "b", "m") if VARIANTS[lora.variant].has_lengths else ("a", "b")


def find_matrices(lora: config.Lora, params_like, describe: Describe) -> list[str]:
    """The paths of the matrices that have an adapter, in the order of the tree.

    Raises UsageError for a target without a matrix, and for a rank that a matrix has not got.
    """
    field = "config.lora.targets"
    leaves = leaves_by_path(params_like)
    chosen: set[str] = set()
    for i, paths in enumerate(find_parameters(lora.targets, leaves, describe, field)):
        matrices = {path for path in paths if describe(path).role in ADAPTABLE}
        if not matrices:
            roles = sorted({describe(path).role for path in paths})
            raise UsageError(
                f"{field}[{i}] = {lora.targets[i]!r}: names parameters of the role "
                f"{', '.join(roles)}, which have no adapters; name some of {', '.join(ADAPTABLE)}"
            )
        chosen |= matrices

    for path in sorted(chosen):
        sides = leaves[path].shape[-2:]
        if lora.rank > min(sides):
            raise UsageError(
                f"config.lora.rank = {lora.rank}: is more than the rank of {path}, which is a "
                f"matrix of {sides[0]} x {sides[1]}; choose at most {min(sides)}, or leave it out "
                "of config.lora.targets"
            )
    return [path for path in leaves if path in chosen]


# ---- trees ---------------------------------------------------------------------------------------


def nest_paths(leaves: Mapping[str, Any]) -> dict:
    """A tree of nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_adapters(change: Callable, adapters, params):
    """The tree of `change(adapter, matrix)`, for each adapter and the matrix beneath it."""
    if adapters.keys() >= FACTORS:
        return change(adapters, params)
    return {name: map_adapters(change, below, params[name]) for name, below in adapters.items()}


def graft(tree, part):
    """`tree` with what `part` has of it in its place."""
    if not isinstance(part, dict):
        return part
    return {
        name: graft(below, part[name]) if name in part else below for name, below in tree.items()
    }


# ---- adapters ------------------------------------------------------------------------------------


def init_adapters(lora: config.Lora, params, describe: Describe, key: jax.Array) -> dict:
    """Adapters that change nothing yet, laid out like the matrices beneath. Call it under jit.

    The values are the same on every mesh. Those of one matrix do not depend on the other targets.
    """
    leaves = leaves_by_path(params)

    def init(path):
        weight = leaves[path]
        *lead, width, features = weight.shape
        # This is the distribution of torch's linear layers, which PEFT starts from.
        bound = 1 / math.sqrt(width)
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own_key, (*lead, width, lora.rank), minval=-bound, maxval=bound)
        b = jnp.zeros((*lead, lora.rank, features), jnp.float32)
        a, b = sharding.lay_out_factors(a, b, weight)
        if not VARIANTS[lora.variant].has_lengths:
            return {"a": a, "b": b}
        return {"a": a, "b": b, "m": measure_columns(weight)}

    return nest_paths({path: init(path) for path in find_matrices(lora, params, describe)})


def measure_columns(weight: jax.Array) -> jax.Array:
    """The length of each column: [..., in, out] -> [..., out]."""
    return jnp.sqrt(jnp.square(weight).sum(-2))


def apply_adapters(lora: config.Lora, adapters, params) -> Adapted:
    """Parameters and adapters as the model's layers take them."""
    scale = find_scale(lora)

    def prepare(adapter, weight):
        lead = weight.shape[:-2]
        ready = {"a": adapter["a"], "b": adapter["b"] * scale}
        if lora.dropout:
            ready["dropout"] = jnp.full(lead, lora.dropout, jnp.float32)
        if "m" in adapter:
            # The paper takes the length for a constant (section 4.3), which saves memory.
            moved = jax.lax.stop_gradient(weight + scale * (adapter["a"] @ adapter["b"]))
            ready["gain"] = adapter["m"] / measure_columns(moved)
        return ready

    return Adapted(params, map_adapters(prepare, adapters, params))


def merge_adapters(lora: config.Lora, adapters, params):
    """The whole parameters of a model that has the adapters in its weights."""
    scale = find_scale(lora)

    def merge(adapter, weight):
        moved = weight + scale * (adapter["a"] @ adapter["b"])
        if "m" not in adapter:
            return moved
        gain = adapter["m"] / measure_columns(moved)
        return moved * gain[..., None, :]

    return graft(params, map_adapters(merge, adapters, params))


def add_adapters(network: Network, lora: config.Lora) -> Network:
    """A network that learns adapters alone, beside the weights `frozen["base"]`."""

    def assemble(adapters, frozen):
        return apply_adapters(lora, adapters, frozen[BASE])

    return network._replace(assemble=assemble, describe=describe_adapters(network.describe))
