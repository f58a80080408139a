"""A trained model made ready to be asked: as it infers, and not as it was trained."""

import dataclasses
from collections.abc import Callable

import jax

from gpt_jax import config, sharding
from gpt_jax.model import KERNELS, MULTIPLIED, choose_kernel, describe_parameter, make_problem


def make_ready(
    model: config.Model, compute: config.Compute, params, report: Callable[[str], None]
) -> tuple[config.Model, config.Compute, dict]:
    """The model without dropout, capacities and fp8, and its matmul weights in the compute dtype.

    `model` must be resolved. `report` gets a line if capacities or fp8 were dropped.
    """
    for line in config.describe_inference(compute):
        report(line)
    model, compute = config.for_inference(model, compute)
    return drop_capacity(model, report), compute, cast_multiplied(params, compute.dtype)


def cast_multiplied(params, dtype: str):
    """Casts matmul weights once to the dtype in which they are multiplied.

    The numbers do not change. A step reads half the bytes.
    """
    if dtype == "float32":
        return params

    def cast(keys, x):
        role = describe_parameter(sharding.join_path(keys)).role
        return x.astype(dtype) if role in MULTIPLIED else x

    return jax.tree_util.tree_map_with_path(cast, params)


def drop_capacity(model: config.Model, report: Callable[[str], None]) -> config.Model:
    """The model with experts that take every token, whatever they did in training.

    A capacity goes by the length of the row, which here is a bucket for a text and one token
    after that. So an answer would depend on the other texts, and on whether its keys are cached.
    """
    if model.dispatch != "capacity" or not config.has_experts(model):
        return model
    report(
        "config.model.dispatch = 'capacity' is for rows of training; text is generated and scored "
        "dropless, so every expert takes all of its tokens"
    )
    return dataclasses.replace(model, dispatch="dropless")


def with_kernel(
    model: config.Model, compute: config.Compute, length: int, common: bool = False
) -> config.Compute:
    """`compute` with the attention kernel for rows of `length`, with keys in common or without.

    This is the kernel of the config where it can do that length, and else the choice of `auto`.
    Training may have another length: splash wants multiples of 128.
    """
    platform = jax.default_backend()
    problem = make_problem(model, compute.dtype, length, platform, common=common)
    kernel = compute.kernel
    if kernel == "auto" or KERNELS[kernel].cannot(problem):
        kernel = choose_kernel("auto", problem)[0]
    return dataclasses.replace(compute, kernel=kernel)
