"""The table of parameters is complete, and says where each one really lies."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import MODELS, make_model

from gpt_jax import config, sharding
from gpt_jax.model.parameters import KINDS, describe_parameter, list_parameters
from gpt_jax.model.transformer import abstract_params

EVERYTHING = dict(
    layers=4,
    embed=32,
    heads=4,
    vocab=64,
    max_seq=16,
    tied=False,
    qk_norm=True,
    embed_norm=True,
    value_embed=True,
    value_embed_gate=4,
    smear=True,
    smear_gate=4,
    backout=True,
    residual_scalars=True,
    pattern=(("attention", "swiglu"), ("attention", "moe")),
    shared_experts=1,
    balance="bias",
)


def make_everything() -> config.Model:
    return config.resolve(config.Config(model=config.Model(**EVERYTHING))).model


def make_all_models() -> dict[str, config.Model]:
    return {name: make_model(name) for name in MODELS} | {"everything": make_everything()}


@pytest.mark.parametrize("name", make_all_models())
def test_axes_are_those_that_the_arrays_lie_by(name, mesh):
    """The layout that the model gives an array is that of its axes by the STORED rules."""
    model = make_all_models()[name]
    with jax.set_mesh(mesh(data=1, fsdp=2, expert=2, tensor=2)):
        params = abstract_params(model)
        for parameter, leaf in list_parameters(params):
            spec = sharding.make_spec(sharding.STORED, parameter.axes)
            wanted = P(None, *spec) if parameter.stacked else spec
            assert leaf.sharding.spec == wanted, parameter.path
            assert leaf.ndim == len(wanted), parameter.path


def test_every_row_fits_something():
    """A row that fits nothing is dead, or its path has changed."""
    model = make_everything()
    parameters = [parameter for parameter, _ in list_parameters(abstract_params(model))]
    fitting = set()
    for parameter in parameters:
        patterns = [p for p, _ in KINDS if re.search(rf"(^|/){p}$", parameter.path)]
        fitting.add(patterns[0])  # the row that `describe_parameter` takes
    assert [pattern for pattern, _ in KINDS if pattern not in fitting] == []


def test_a_path_may_lie_in_an_optimisers_state():
    in_state = describe_parameter("opt/1/inner_states/default/mu/blocks/0/attention/q/kernel")
    alone = describe_parameter("blocks/0/attention/q/kernel")
    assert in_state[1:] == alone[1:]
    assert alone.stacked and not describe_parameter("tail/0/attention/q/kernel").stacked


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="blocks/0/mystery/weights: no row of KINDS"):
        list_parameters({"blocks": {"0": {"mystery": {"weights": jax.numpy.zeros((2, 2))}}}})
