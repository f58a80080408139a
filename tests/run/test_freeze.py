"""Parameters that stay as they are, and layers with rates of their own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from meshes import ROWS, make_columns, make_config
from small_configs import refuses

from gpt_jax import config as configs, sharding
from gpt_jax.model import abstract_params, describe_parameter, number_layers
from gpt_jax.run.parts import find_layer_rates, make_network, make_run_optimizer, make_steps
from gpt_jax.train import scale_layers
from gpt_jax.train.optim.groups import assign, leaves_by_path

MODEL = "tail"  # two layers that are scanned, and one behind them
ADAMW = configs.Optim(schedule="constant", learning_rate=0.1, weight_decay=0.5)
SGD = configs.Optim(optimizer="sgd", b1=0.0, schedule="constant", learning_rate=0.1, clip=0.0)


def update(mesh, optim=SGD, name=MODEL, **train):
    """(parameters before, parameters after two updates, the last state) by path."""
    settings = replace(make_config(name), optim=optim)
    settings = replace(settings, train=replace(settings.train, **train))
    columns = make_columns(name)
    with jax.set_mesh(mesh):
        steps = make_steps(settings, mesh)
        state = steps.make_state()
        # A weight of -0 is among those that must stay.
        table = state.params["embed"]["table"]
        state.params["embed"]["table"] = jnp.where(table < -0.03, -0.0, table)
        before = by_path(state.params)
        for _ in range(2):
            state, _ = steps.train_step(state, sharding.to_devices(mesh, columns, ROWS))
    return before, by_path(state.params), state


def by_path(params):
    return {path: np.array(leaf) for path, leaf in leaves_by_path(params).items()}


def test_what_is_frozen_keeps_its_bits(mesh):
    freeze = ("embedding", "norm", "blocks/0/mlp/")
    before, after, state = update(mesh(2, 2, 2), ADAMW, freeze=freeze, accumulate=2, ema=0.9)
    moved = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    stays = {
        path for path in before if path.startswith(("embed/", "blocks/0/mlp/")) or "norm/" in path
    }
    assert len(stays) == 9 and stays | moved == set(before) and not stays & moved
    assert np.signbit(before["embed/table"][before["embed/table"] == 0]).any()

    moments = [leaf.shape for path, leaf in leaves_by_path(state.opt).items() if "/mu/" in path]
    assert len(moments) == len(moved)
    # Averages of what stays are what stays. Those of the table began before it was changed above.
    averages = by_path(state.ema)
    assert all(np.array_equal(averages[path], after[path]) for path in stays - {"embed/table"})


@pytest.mark.parametrize(
    "freeze, words",
    [
        (("embeding",), ("config.train.freeze[0] = 'embeding'", "its roles are embedding, matrix")),
        ((".",), ("config.train.freeze = ('.',)", "leaves nothing to be learned")),
        (("(",), ("neither a role nor a regular expression",)),
    ],
)
def test_refusals(mesh, freeze, words):
    refuses(lambda: update(mesh(1), freeze=freeze), *words)


def test_a_group_may_have_frozen_parameters_alone():
    like = abstract_params(make_config(MODEL).model)
    optim = replace(ADAMW, groups=(configs.Group("^embed/"),))
    index = assign(optim, like, describe_parameter, frozenset({"embed/table"}))
    assert "embed/table" not in index and len(index) == len(leaves_by_path(like)) - 1
    optim = replace(ADAMW, groups=(configs.Group("^nothing/"),))
    refuses(
        lambda: assign(optim, like, describe_parameter, frozenset({"embed/table"})),
        "found in no parameter path",
    )


def test_rates_of_layers():
    """Half the rate for each layer further down, in a table that was written by hand."""
    settings = make_config(MODEL)
    settings = replace(settings, optim=configs.Optim(layer_decay=0.5))
    rates = find_layer_rates(settings, abstract_params(settings.model))
    assert {path: np.asarray(rate).tolist() for path, rate in rates.items()} == {
        path: {"blocks": [0.125, 0.25], "tail": 0.5, "final_norm": 1.0, "embed": 0.0625}[
            path.split("/")[0]
        ]
        for path in rates
    }
    modern = make_config("modern").model
    assert number_layers(modern, "blocks/1/mlp/up/kernel") == (2, 4)
    assert number_layers(modern, "tail/0/mlp/up/kernel") == 5
    assert number_layers(modern, "residual/x") == (1, 2, 3, 4, 5)
    assert [number_layers(modern, path) for path in ("head/kernel", "smear/gate/kernel")] == [6, 0]


def test_updates_have_the_rates_of_their_layers():
    """SGD moves each layer by its own part of what it moves it by without the decay."""
    settings = make_config(MODEL)
    like = abstract_params(settings.model)
    network = make_network(settings.model, settings.compute)

    def move(optim):
        tx = make_run_optimizer(replace(settings, optim=optim), network, like)
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), like)
        return leaves_by_path(tx.update(ones, tx.init(ones), ones)[0])

    decayed = replace(SGD, layer_decay=0.5)
    rates = find_layer_rates(replace(settings, optim=decayed), like)
    slow = move(decayed)
    for path, step in move(SGD).items():
        np.testing.assert_allclose(slow[path], step * spread(rates[path], step), rtol=1e-5)
        assert np.abs(step).min() > 0.01


def spread(rate, like):
    rate = np.asarray(rate)
    return rate.reshape(-1, *[1] * (like.ndim - 1)) if rate.ndim else rate


def test_layers_in_stages_have_their_rates(mesh):
    settings = replace(make_config("gpt2"), optim=replace(SGD, layer_decay=0.5))
    with jax.set_mesh(mesh(pipeline=2, fsdp=2, data=2)):
        like = abstract_params(settings.model)
        rates = find_layer_rates(settings, like)
        tx = scale_layers(rates)

        def update():
            ones = jax.tree.map(lambda x: jnp.ones(x.shape, out_sharding=x.sharding.spec), like)
            return tx.update(ones, tx.init(ones))[0]

        updates = leaves_by_path(jax.jit(update)())
    for path, values in updates.items():
        wanted = np.broadcast_to(spread(rates[path], values), values.shape)
        np.testing.assert_allclose(values, wanted, rtol=1e-6)
    assert np.asarray(rates["blocks/0/mlp/up/kernel"]).tolist() == [0.0625, 0.125, 0.25, 0.5]


def test_a_command_prints_what_is_frozen(tmp_path, capsys):
    flags = ("--config.train.steps=2", "--config.train.freeze=matrix", "--config.eval.batches=1")
    runs.call(*runs.arguments(tmp_path, tmp_path / "run", *flags, "--config.optim.layer_decay=0.8"))
    printed = capsys.readouterr().out
    assert "optimiser: nothing for frozen: 6 tensors, 24,576 parameters" in printed
    assert "layers have rates of their own: 0.512 of the peak at the input" in printed
