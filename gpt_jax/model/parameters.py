"""What each parameter of the transformer is: one table, which everybody reads.

A path joins the keys of the parameter tree with "/", as in `blocks/0/attention/q/kernel`. What lies
under `blocks/` is stacked over the repeats of the layer pattern: its first dim counts layers. Other
keys may stand before a path, as they do in an optimiser's state.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from gpt_jax import config, sharding
from gpt_jax.config import layer_specs, layout

STACKED = re.compile(r"(^|/)blocks/")


class Kind(NamedTuple):
    """What a parameter is, whatever its layer.

    `role` says what is done with it. `axes` are the logical axes of its own dims, see
    sharding/rules.py; the dim of a stack is not among them.
    """

    role: str
    axes: tuple[str | None, ...]


class Parameter(NamedTuple):
    """What the parameter at a path is.

    If it is `stacked`, its first dim counts layers, and its other dims are `axes`.
    """

    path: str
    role: str
    axes: tuple[str | None, ...]
    stacked: bool


INTO_EXPERT = ("experts", "expert_embed", "mlp")
OUT_OF_EXPERT = ("experts", "mlp", "expert_embed")

# These are the roles.
#
# - `embedding`, `value_embedding` and `position` are tables whose rows are looked up.
# - `head` is the untied output matrix.
# - `matrix` is a matmul inside a layer.
# - `expert` has one matrix for each expert.
# - `router` and `gate` are small matmuls of a layer that choose or weigh.
# - `input_gate` is a small matmul before the first layer.
# - `router_bias` is a bias that no gradient moves, see model/experts/moe.py.
# - `bias`, `norm` and `scalar` are everything that is added or scales.
#
# A row is the end of a path and what such a parameter is. The first row that fits is taken.
KINDS: tuple[tuple[str, Kind], ...] = (
    (r"value_embed/table", Kind("value_embedding", ("vocab", "embed"))),
    (r"embed/table", Kind("embedding", ("vocab", "embed"))),
    (r"position/table", Kind("position", ("position", "embed"))),
    (r"head/kernel", Kind("head", ("embed", "vocab"))),
    (r"router/kernel", Kind("router", ("embed", None))),
    (r"router/bias", Kind("router_bias", (None,))),
    (r"experts/(up|gate)/kernel", Kind("expert", INTO_EXPERT)),
    (r"experts/down/kernel", Kind("expert", OUT_OF_EXPERT)),
    (r"attention/value_gate/kernel", Kind("gate", ("gate", "kv_heads"))),
    (r"smear/gate/kernel", Kind("input_gate", ("gate", None))),
    (r"attention/q/kernel", Kind("matrix", ("embed", "heads"))),
    (r"attention/[kv]/kernel", Kind("matrix", ("embed", "kv_heads"))),
    (r"attention/out/kernel", Kind("matrix", ("heads", "embed"))),
    (r"(mlp|shared)/(up|gate)/kernel", Kind("matrix", ("embed", "mlp"))),
    (r"(mlp|shared)/down/kernel", Kind("matrix", ("mlp", "embed"))),
    (r"attention/q/bias", Kind("bias", ("heads",))),
    (r"attention/[kv]/bias", Kind("bias", ("kv_heads",))),
    (r"attention/out/bias", Kind("bias", ("embed",))),
    (r"(mlp|shared)/(up|gate)/bias", Kind("bias", ("mlp",))),
    (r"(mlp|shared)/down/bias", Kind("bias", ("embed",))),
    (r"(smear/factor|backout)/scale", Kind("scalar", ("scale",))),
    (r"residual/(x|x0)", Kind("scalar", ("layers",))),
    (r"\w*norm/(scale|bias)", Kind("norm", ("scale",))),
)

# The roles of the weights that activations are multiplied with.
MULTIPLIED = ("head", "matrix", "expert", "router", "gate", "input_gate")


def describe_parameter(path: str) -> Parameter:
    """Finds what the parameter at `path` is. Raises KeyError if no row of `KINDS` fits."""
    for pattern, kind in KINDS:
        if re.search(rf"(^|/){pattern}$", path):
            return Parameter(path, kind.role, kind.axes, bool(STACKED.search(path)))
    raise KeyError(f"{path}: no row of KINDS in gpt_jax/model/parameters.py fits")


# What is before the first layer, by role and by the beginning of its path.
FIRST_ROLES = ("embedding", "value_embedding", "position", "input_gate")
FIRST_PATHS = ("embed_norm/", "smear/")
PERIOD = re.compile(r"(?:^|/)(blocks|tail)/(\d+)/")


def number_layers(model: config.Model, path: str) -> int | tuple[int, ...]:
    """Where the parameter at `path` stands: 0 at the input, layers + 1 at the output.

    Layers count from 1. A parameter that has a dim of layers has a number for each of them. The
    tied embedding is at the input.
    """
    parameter = describe_parameter(path)
    place = PERIOD.search(path)
    plan = layout(layer_specs(model))
    period = len(plan.period)
    if place and place[1] == "blocks":
        return tuple(1 + int(place[2]) + period * turn for turn in range(plan.repeats))
    if place:
        return 1 + period * plan.repeats + int(place[2])
    if parameter.axes == ("layers",):
        return tuple(range(1, model.layers + 1))
    is_first = parameter.role in FIRST_ROLES or path.startswith(FIRST_PATHS)
    return 0 if is_first else model.layers + 1


def list_parameters(params: Mapping[str, Any]) -> list[tuple[Parameter, Any]]:
    """Lists what the leaves of a tree are, each with the leaf, in the order of the tree.

    The leaves are arrays or their shapes. Raises KeyError if no row of `KINDS` fits one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(describe_parameter(sharding.join_path(keys)), leaf) for keys, leaf in leaves]
