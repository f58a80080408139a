"""Parameters of the state that stay as they are, to the bit.

They are no part of the gradient, so that the compiler leaves out what only they would need. They
have no moments.
"""

import jax

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.train.objectives import Network
from gpt_jax.train.optim.groups import Describe, leaves_by_path
from gpt_jax.train.targets import find_parameters


def find_frozen(train: config.Train, params_like, describe: Describe) -> frozenset[str]:
    """The paths of the parameters that `train.freeze` names.

    Raises UsageError for an entry that names nothing, and if nothing is left to be learned.
    """
    leaves = leaves_by_path(params_like)
    named = find_parameters(train.freeze, leaves, describe, "config.train.freeze")
    frozen = frozenset().union(*named)
    if frozen >= leaves.keys():
        raise UsageError(
            f"config.train.freeze = {train.freeze!r}: leaves nothing to be learned; name less"
        )
    return frozen


def hold(network: Network, frozen: frozenset[str]) -> Network:
    """A network in which the parameters at these paths have no gradient."""
    if not frozen:
        return network

    def assemble(learned, others):
        def stop(keys, leaf):
            is_frozen = sharding.join_path(keys) in frozen
            return jax.lax.stop_gradient(leaf) if is_frozen else leaf

        return network.assemble(jax.tree_util.tree_map_with_path(stop, learned), others)

    return network._replace(assemble=assemble)
