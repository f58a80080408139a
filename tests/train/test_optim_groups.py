"""Groups of parameters. Each parameter is in one, and trains there as if alone."""

import jax
import numpy as np
import optax
import pytest
from optimizers import (
    MODEL,
    assert_close,
    assign,
    describe_groups,
    draw,
    flat,
    gradients,
    make_optimizer,
    nest,
    optim,
    run,
)

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model import abstract_params
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.train.optim import groups as optim_groups
from gpt_jax.train.optim.groups import leaf_dims
from gpt_jax.train.optim.optimizer import gradient_norm

MODERN_GROUPS = (
    config.Group(match="^(embed|value_embeds)/", rate=15.0, b1=0.8, b2=0.995),
    config.Group(match="^head/", rate=0.4, b1=0.8, b2=0.96),
    config.Group(match="kernel$", optimizer="muon", weight_decay=0.28),
)


def test_every_parameter_in_one_group_and_the_first_match_wins():
    params = draw(0, MODEL)
    o = optim(groups=MODERN_GROUPS)
    index = assign(o, params)
    assert index == {
        "embed/table": 0,
        "head/kernel": 1,
        "blocks/0/mlp/up/kernel": 2,
        "blocks/0/mlp/down/kernel": 2,
        "tail/0/mlp/up/kernel": 2,
        "blocks/0/mlp_norm/scale": 3,
        "tail/0/mlp/up/bias": 3,
        "residual/x": 3,
    }
    rows = describe_groups(o, jax.eval_shape(lambda: params))
    assert sum(row.tensors for row in rows) == len(MODEL)
    assert sum(row.parameters for row in rows) == sum(x.size for x in flat(params).values())
    assert rows[0] == ("group0 ^(embed|value_embeds)/", "adamw", 1, 128, pytest.approx(0.3), 0.0)
    assert rows[3] == ("default", "adamw", 3, 36, pytest.approx(0.02), 0.1)


def test_a_router_bias_has_a_rule_of_its_own():
    """It moves by balance_rate against the sign, whatever rate, decay and groups say.

    The clipping norm does not count it.
    """
    bias = {"blocks/0/mlp/router/bias": ((2, 4), None)}
    o = optim(
        clip=0.1,
        decay="all",
        groups=(config.Group(match=".", optimizer="sgd", b1=0.0, weight_decay=0.3),),
    )
    params = draw(0, MODEL | {path: shape for path, (shape, _) in bias.items()})
    grads = [draw(i, MODEL) for i in (1, 2)]
    excess = np.array([[3.0, -1.0, 0.0, 4e6], [-2.0, 1.0, 1.0, 0.0]], np.float32)
    steered = [nest(flat(g) | dict.fromkeys(bias, excess)) for g in grads]
    found = flat(run(make_optimizer(o, params, balance_rate=0.25), params, steered)[0])
    moved = found.pop("blocks/0/mlp/router/bias") - flat(params).pop("blocks/0/mlp/router/bias")
    np.testing.assert_allclose(moved, -2 * 0.25 * np.sign(excess), atol=1e-6)
    plain = nest({path: leaf for path, leaf in flat(params).items() if path not in bias})
    assert_close(nest(found), run(make_optimizer(o, plain), plain, grads)[0])
    assert not set(bias) & set(assign(o, params))
    assert describe_groups(o, params, balance_rate=0.25)[-1] == (
        "router/bias",
        "sign",
        1,
        8,
        0.25,
        0.0,
    )
    np.testing.assert_allclose(
        gradient_norm(steered[0], describe_parameter), optax.tree.norm(grads[0]), rtol=1e-6
    )


def test_default_muon_takes_the_matrices_inside_layers_only():
    index = assign(optim(optimizer="muon"), draw(0, MODEL))
    assert {path for path, i in index.items() if i == 0} == {
        path for path in MODEL if path.startswith(("blocks/", "tail/")) and path.endswith("kernel")
    }
    assert set(index.values()) == {0, 1}
    rows = describe_groups(optim(optimizer="muon"), draw(0, MODEL))
    assert [(row.group, row.optimizer) for row in rows] == [
        ("default", "muon"),
        ("default_adamw", "adamw"),
    ]


def test_default_muon_leaves_the_tables_of_a_real_model_to_adamw():
    """It goes by the role of a parameter, because value embeddings lie inside layers."""
    model = config.resolve(
        config.Config(
            model=config.Model(
                layers=4,
                embed=32,
                heads=4,
                vocab=64,
                value_embed=True,
                smear=True,
                backout=True,
                tied=False,
                pattern=(("attention", "gelu"), ("attention", "moe")),
            )
        )
    ).model
    params = abstract_params(model)
    index = optim_groups.assign(optim(optimizer="muon"), params, describe_parameter)
    taken = {path for path, i in index.items() if i == 0}
    left = {path for path, i in index.items() if i == 1}
    tables = {path for path in index if path.endswith("/table")}
    assert len(tables) == 3 and tables | {"head/kernel"} <= left
    wanted = {"q", "k", "v", "out", "value_gate", "up", "down", "gate", "router"}
    assert {path.rsplit("/", 3)[-2] for path in taken} == wanted
    assert {describe_parameter(path).role for path in taken} == set(optim_groups.MUON_ROLES)


def test_groups_train_as_if_alone():
    """Each group's parameters move as under an optimiser of their own with the group's knobs."""
    params = draw(0, MODEL)
    grads = gradients(MODEL)
    o = optim(groups=MODERN_GROUPS, clip=0.0)
    index = assign(o, params)
    found = flat(run(make_optimizer(o, params), params, grads)[0])
    for i, group in enumerate(MODERN_GROUPS):

        def own(tree):
            return nest({path: x for path, x in flat(tree).items() if index[path] == i})

        alone = optim(
            optimizer=group.optimizer,
            learning_rate=o.learning_rate * group.rate,
            b1=group.b1,
            b2=group.b2,
            weight_decay=group.weight_decay,
            clip=0.0,
        )
        assert_close(
            nest({path: found[path] for path in index if index[path] == i}),
            run(make_optimizer(alone, own(params)), own(params), [own(g) for g in grads])[0],
        )


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            (config.Group(match="embd"),),
            r"config\.optim\.groups\[0\]\.match = 'embd': found in no parameter path",
        ),
        (
            (config.Group(match="kernel"), config.Group(match="head")),
            r"groups\[1\]\.match = 'head': .* taken by .*\[0\]",
        ),
        (
            (config.Group(match="*"),),
            r"config\.optim\.groups\[0\]\.match = '\*': not a regular expression",
        ),
        (
            (config.Group(match="blocks", optimizer="muon"),),
            r"groups\[0\]\.match = 'blocks': takes blocks/0/mlp_norm/scale",
        ),
    ],
)
def test_group_errors_name_the_field(groups, message):
    with pytest.raises(UsageError, match=message):
        make_optimizer(optim(groups=groups), draw(0, MODEL))


def test_leaf_dims():
    found = {
        path: leaf_dims(leaf, describe_parameter(path))
        for path, leaf in flat(draw(0, MODEL)).items()
    }
    assert found == {path: 2 if path.endswith(("kernel", "table")) else 1 for path in MODEL}
