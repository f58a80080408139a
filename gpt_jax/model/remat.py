"""What the backward pass keeps of a layer: one row for each name of `config.compute.remat`."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import Offloadable

from gpt_jax import config, sharding
from gpt_jax.model.attention.kernels import RESULTS, is_cudnn_result, is_kernel_result

POLICIES = jax.checkpoint_policies


def _keep_nothing(compute: config.Compute) -> None:
    """Every layer is computed again from its input."""
    return None


def _keep_matmuls(compute: config.Compute) -> Callable:
    """The results of matmuls and of attention kernels stay."""
    return POLICIES.save_from_both_policies(
        POLICIES.dots_with_no_batch_dims_saveable, is_kernel_result
    )


def _offload_matmuls(compute: config.Compute) -> Callable:
    """The results of matmuls go to the memory of the host."""
    return POLICIES.offload_dot_with_no_batch_dims("device", sharding.HOST)


def _keep_names(compute: config.Compute) -> Callable:
    """Values that bear the names of `remat_save` stay, and those of `remat_offload` go to the host.

    The names are those of config.REMAT_NAMES.
    """
    saved = _add_marks(compute.remat_save)
    offloaded = _add_marks(compute.remat_offload)
    by_name = POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst=sharding.HOST,
    )
    # The results of cuDNN's kernel have no name, so the policy knows them by their primitive.
    of_cudnn = "attention" in saved
    if "attention" in offloaded:
        of_cudnn = Offloadable(src="device", dst=sharding.HOST)

    def policy(primitive, *arrays, **params):
        if is_cudnn_result(primitive):
            return of_cudnn
        return by_name(primitive, *arrays, **params)

    return policy


def _add_marks(names: tuple[str, ...]) -> list[str]:
    """The names, and with `attention` what splash and flash call their results."""
    return [*names, *RESULTS] if "attention" in names else [*names]


# Each row makes a policy of `jax.checkpoint` for the section `compute`. None keeps nothing.
REMATS = {
    "block": _keep_nothing,
    "dots": _keep_matmuls,
    "offload": _offload_matmuls,
    "names": _keep_names,
}
