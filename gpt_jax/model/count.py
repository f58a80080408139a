"""The number of parameters by what is done with them."""

from gpt_jax import config
from gpt_jax.model.parameters import MULTIPLIED, list_parameters
from gpt_jax.model.transformer import abstract_params

LOOKED_UP = ("embedding", "value_embedding", "position")


def count_params(model: config.Model) -> dict[str, int]:
    """Counts the parameters: `total`, `embedding` and `matmul`.

    `embedding` counts the tables whose rows are looked up. `matmul` counts the weights that a
    token is multiplied with, a tied head among them. Of the experts it counts those that a token
    is sent to, as far as their capacity goes.
    """
    parameters = list_parameters(abstract_params(model))

    def count(*roles: str) -> int:
        return sum(leaf.size for parameter, leaf in parameters if parameter.role in roles)

    room = min(1.0, model.capacity_factor) if model.dispatch == "capacity" else 1
    experts = count("expert")
    active = int(experts * model.experts_per_token // model.experts * room)
    tied_head = model.vocab * model.embed if model.tied else 0

    return {
        "total": sum(leaf.size for _, leaf in parameters),
        "embedding": count(*LOOKED_UP),
        "matmul": count(*MULTIPLIED) - experts + active + tied_head,
    }
