"""The number of parameters by what is done with them."""

import jax

from gpt_jax import config
from gpt_jax.model.transformer import abstract_params


def count_params(model: config.Model) -> dict[str, int]:
    """`total`, `embedding` (rows looked up) and `matmul` (weights that a token is multiplied
    with: a tied head counted, and of experts those that it is sent to, as far as their capacity
    goes) parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size for path, leaf in leaves
    }

    def of(ending, part=""):
        return sum(size for path, size in sizes.items() if path.endswith(ending) and part in path)

    experts = of("/kernel", "/experts/")
    room = min(1.0, model.capacity_factor) if model.dispatch == "capacity" else 1
    active = int(experts * model.experts_per_token // model.experts * room)
    return {
        "total": sum(sizes.values()),
        "embedding": of("/table"),
        "matmul": of("/kernel")
        - experts
        + active
        + (model.vocab * model.embed if model.tied else 0),
    }
