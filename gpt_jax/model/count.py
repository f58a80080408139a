"""The number of parameters by what is done with them."""

from gpt_jax import config
from gpt_jax.model.parameters import list_parameters
from gpt_jax.model.transformer import abstract_params

LOOKED_UP = ("embedding", "value_embedding", "position")
MULTIPLIED = ("head", "matrix", "router", "gate")


def count_params(model: config.Model) -> dict[str, int]:
    """The number of parameters: `total`, `embedding` and `matmul`.

    `embedding` counts rows that are looked up. `matmul` counts weights that a token is multiplied
    with. A tied head is among them. Of the experts those count that a token is sent to, as far as
    their capacity goes.
    """
    parameters = list_parameters(abstract_params(model))

    def count(*roles: str) -> int:
        return sum(p.size for p in parameters if p.kind.role in roles)

    room = min(1.0, model.capacity_factor) if model.dispatch == "capacity" else 1
    active = int(count("expert") * model.experts_per_token // model.experts * room)
    tied_head = model.vocab * model.embed if model.tied else 0
    return {
        "total": sum(p.size for p in parameters),
        "embedding": count(*LOOKED_UP),
        "matmul": count(*MULTIPLIED) + active + tied_head,
    }
