"""Optimisers against plain numpy, stacked against separate, and 8 devices against one.

Run as a program, this file is the 8-device half of the comparison, because its process needs its
own number of devices.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model import abstract_params
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.sharding.mesh import make_mesh
from gpt_jax.train.optim import groups as optim_groups, muon, optimizer
from gpt_jax.train.optim.groups import leaf_dims
from gpt_jax.train.optim.optimizer import ema_init, ema_update, gradient_norm
from gpt_jax.train.optim.schedule import make_schedule

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
SHAPES = {  # path -> (shape, sharding on the mesh of 8)
    "embed/table": ((16, 8), ("tensor", "fsdp")),
    # This one is large enough for Adafactor to factor.
    "blocks/0/mlp/up/kernel": (
        (2, 128, 256),
        (None, "fsdp", "tensor"),
    ),
    "blocks/0/mlp/down/kernel": ((2, 16, 8), (None, "tensor", "fsdp")),
    "blocks/0/mlp_norm/scale": ((2, 8), (None, "fsdp")),
    "tail/0/mlp/up/kernel": ((8, 16), ("fsdp", "tensor")),
    "tail/0/mlp/up/bias": ((16,), ("tensor",)),
    "residual/x": ((4,), (None,)),
    "head/kernel": ((8, 16), ("fsdp", "tensor")),
}
MODEL = {path: shape for path, (shape, _) in SHAPES.items()}
MODERN = dict(
    muon_momentum_warmup=3,
    muon_momentum_final=0.5,
    schedule="wsd",
    muon_cautious=True,
    muon_decay_to_zero=True,
    muon_normalize=True,
)


def make_optimizer(knobs, params, **others):
    return optimizer.make_optimizer(knobs, params, describe_parameter, **others)


def assign(knobs, params):
    return optim_groups.assign(knobs, params, describe_parameter)


def describe_groups(knobs, params, **others):
    return optim_groups.describe_groups(knobs, params, describe_parameter, **others)


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = leaf
    return tree


def flat(tree):
    return {
        "/".join(k.key for k in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def draw(seed, shapes, scale=1.0):
    random = np.random.default_rng(seed)
    return nest(
        {
            path: (scale * random.standard_normal(shape)).astype(np.float32)
            for path, shape in shapes.items()
        }
    )


def optim(**knobs):
    return config.Optim(
        **{"learning_rate": 0.02, "warmup_steps": 2, "decay_steps": 8, "weight_decay": 0.1, **knobs}
    )


def gradients(shapes, steps=5):
    # The first gradients are small, and the last ones are clipped.
    return [draw(100 + step, shapes, scale=0.01 * 4**step) for step in range(steps)]


def run(tx, params, grads):
    """Parameters and state after all of `grads`, under jit."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def assert_close(tree, expected, rtol=1e-5, atol=1e-6):
    found = flat(tree)
    expected = flat(expected)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=rtol, atol=atol, err_msg=path)


# --- optimisers against plain loops in float64


def torch_clip(grads, limit):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    return {path: g * min(1.0, limit / (norm + 1e-6)) for path, g in grads.items()}


def adamw_rule(state, g, t, o):
    state["m"] = o.b1 * state["m"] + (1 - o.b1) * g
    state["v"] = o.b2 * state["v"] + (1 - o.b2) * g * g
    return state["m"] / (1 - o.b1**t) / (np.sqrt(state["v"] / (1 - o.b2**t)) + o.eps)


def lion_rule(state, g, t, o):
    step = np.sign(o.b1 * state["m"] + (1 - o.b1) * g)
    state["m"] = o.b2 * state["m"] + (1 - o.b2) * g
    return step


def sgd_rule(state, g, t, o):
    state["m"] = o.b1 * state["m"] + g
    return state["m"]


def numpy_loop(rule, o, params, grads):
    params = {path: p.astype(np.float64) for path, p in flat(params).items()}
    states = {path: {"m": 0.0, "v": 0.0} for path in params}
    decayed = {path for path in params if o.decay == "all" or path.endswith(("kernel", "table"))}
    for i, g in enumerate(grads):
        rate = o.learning_rate * float(make_schedule(o)(i))
        g = {path: x.astype(np.float64) for path, x in flat(g).items()}
        for path, x in (torch_clip(g, o.clip) if o.clip else g).items():
            params[path] *= 1 - rate * o.weight_decay * (path in decayed)
            params[path] -= rate * rule(states[path], x, i + 1, o)
    return nest(params)


@pytest.mark.parametrize(
    "knobs", [{}, {"decay": "all", "clip": 0.05}, {"clip": 0.0, "schedule": "constant"}]
)
@pytest.mark.parametrize(
    "name, rule", [("adamw", adamw_rule), ("lion", lion_rule), ("sgd", sgd_rule)]
)
def test_against_numpy(name, rule, knobs):
    o = optim(optimizer=name, **knobs)
    params = draw(0, MODEL)
    grads = gradients(MODEL)
    assert_close(
        run(make_optimizer(o, params), params, grads)[0], numpy_loop(rule, o, params, grads)
    )


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e9])
def test_clipping_is_torchs(limit):
    o = optim(
        optimizer="sgd",
        b1=0.0,
        learning_rate=1.0,
        clip=limit,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
    )
    params, (g,) = draw(0, MODEL), gradients(MODEL, 1)
    g = jax.tree.map(lambda x: 0.02 * x, g)  # norm about 0.05: not far above the smallest limit
    tx = make_optimizer(o, params)
    updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    expected = torch_clip({path: x.astype(np.float64) for path, x in flat(g).items()}, limit)
    assert_close(updates, nest({path: -x for path, x in expected.items()}), rtol=1e-6, atol=0)


def test_adafactor_is_the_librarys_without_decay():
    o = optim(optimizer="adafactor", clip=0.0, weight_decay=0.0)
    shapes = {"tail/0/mlp/up/kernel": (128, 256), "head/kernel": (8, 16), "final_norm/scale": (8,)}
    params = draw(0, shapes)
    grads = gradients(shapes, 3)
    library = optax.adafactor(lambda step: o.learning_rate * make_schedule(o)(step))
    assert_close(run(make_optimizer(o, params), params, grads)[0], run(library, params, grads)[0])


def test_adafactor_decay_is_multiplied_by_the_rate():
    params = draw(0, MODEL)
    zero = jax.tree.map(jnp.zeros_like, draw(0, MODEL))
    o = optim(optimizer="adafactor", schedule="constant", warmup_steps=0)
    found = flat(run(make_optimizer(o, params), params, [zero])[0])
    np.testing.assert_allclose(
        found["head/kernel"], flat(params)["head/kernel"] * (1 - 0.02 * 0.1), rtol=1e-6
    )
    np.testing.assert_array_equal(found["residual/x"], flat(params)["residual/x"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_is_each_layer_separately(name):
    kernels = {"mlp/up/kernel": (128, 256), "mlp/down/kernel": (16, 8)}
    stack = {f"blocks/0/{path}": (3, *shape) for path, shape in kernels.items()}
    o = optim(optimizer=name, clip=0.0, **MODERN)
    params = draw(0, stack)
    grads = gradients(stack, 3)

    def layers(tree):
        return nest(
            {
                path.replace("blocks/0", f"tail/{i}"): x[i]
                for path, x in flat(tree).items()
                for i in range(3)
            }
        )

    together = run(make_optimizer(o, params), params, grads)[0]
    params = layers(params)
    grads = [layers(g) for g in grads]
    assert_close(
        layers(together), run(make_optimizer(o, params), params, grads)[0], rtol=1e-4, atol=1e-5
    )


# --- Muon


def newton_schulz(g, iterations):
    """The polynomial applied to the singular values of one dense matrix [m, n], in float64."""
    u, s, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    s = s / np.sqrt(np.sum(np.square(s)))
    for i in range(iterations):
        a, b, c = muon.POLAR_EXPRESS[i]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_orthogonalize(shape):
    g = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    found = jax.jit(muon.orthogonalize)(g)
    np.testing.assert_allclose(found, [newton_schulz(x, 5) for x in g], atol=1e-4)
    assert np.all(np.abs(np.linalg.svd(found, compute_uv=False) - 1) < 0.16)
    exact = muon.orthogonalize(g, iterations=10)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(exact, u @ vt, atol=1e-4)
    rough = muon.orthogonalize(g, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32 and not np.array_equal(rough, found)
    assert np.all(np.abs(np.linalg.svd(rough, compute_uv=False) - 1) < 0.3)
    # Both have the same direction.
    assert np.sum(rough * found) > 0.99 * np.linalg.norm(rough) * np.linalg.norm(found)
    np.testing.assert_array_equal(muon.orthogonalize(np.zeros_like(g), eps=0.0), np.zeros_like(g))


def numpy_muon(o, p, grads):
    """One kernel [in, out], by the book, in float64."""
    p = p.astype(np.float64)
    m = 0.0
    square = 0.0
    for i, g in enumerate(grads):
        rate = o.learning_rate * float(make_schedule(o)(i))
        rise = min(i / o.muon_momentum_warmup, 1.0) if o.muon_momentum_warmup else 1.0
        b = 0.85 + (o.b1 - 0.85) * rise
        if o.muon_momentum_final:
            decay = round(o.decay_fraction * o.decay_steps)
            fall = min(max(0, i - (o.decay_steps - decay)) / decay, 1.0)
            b = b + fall * (o.muon_momentum_final - b)
        m = b * m + (1 - b) * g
        u = newton_schulz(b * m + (1 - b) * g, o.muon_iterations)
        if o.muon_normalize:
            axis = 0 if p.shape[1] >= p.shape[0] else 1
            square = o.b2 * square + (1 - o.b2) * np.mean(u * u, axis=axis, keepdims=True)
            size = np.linalg.norm(u)
            u = u / np.sqrt(square)
            u = u * size / np.linalg.norm(u)
        u = u * np.sqrt(max(1.0, p.shape[1] / p.shape[0]))
        decay = o.weight_decay * (
            0.5 * (1 + np.cos(np.pi * min(i / o.decay_steps, 1.0))) if o.muon_decay_to_zero else 1.0
        )
        p = p - rate * (u + decay * (p * (u * p >= 0) if o.muon_cautious else p))
    return p


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"muon_momentum_warmup": 3},
        {"muon_momentum_final": 0.2, "schedule": "wsd", "decay_steps": 4, "decay_fraction": 0.5},
        {"muon_cautious": True, "weight_decay": 2.0},
        {"muon_decay_to_zero": True, "weight_decay": 2.0, "decay_steps": 4},
        {"muon_normalize": True},
        {**MODERN, "muon_iterations": 6},
    ],
)
@pytest.mark.parametrize("shape", [(6, 15), (15, 6), (8, 8)])
def test_muon_against_numpy(shape, knobs):
    o = optim(optimizer="muon", clip=0.0, **knobs)
    shapes = {"tail/0/mlp/up/kernel": shape}
    params = draw(0, shapes)
    grads = gradients(shapes)
    found = flat(run(make_optimizer(o, params), params, grads)[0])["tail/0/mlp/up/kernel"]
    expected = numpy_muon(
        o, *(flat(params).values()), [next(iter(flat(g).values())) for g in grads]
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("knobs", [{}, {**MODERN, "decay_steps": 4}])
def test_muon_takes_each_experts_matrix_by_itself(knobs):
    """Three layers of two experts, and a last layer of two, move as eight matrices."""
    o = optim(optimizer="muon", clip=0.0, **knobs)
    shapes = {
        "blocks/0/mlp/experts/up/kernel": (3, 2, 6, 15),
        "tail/0/mlp/experts/up/kernel": (2, 6, 15),
    }
    params = draw(0, shapes)
    grads = gradients(shapes)
    assert set(assign(o, params).values()) == {0}
    found = flat(run(make_optimizer(o, params), params, grads)[0])
    for path, shape in shapes.items():
        for at in np.ndindex(shape[:-2]):
            alone = numpy_muon(o, flat(params)[path][at], [flat(g)[path][at] for g in grads])
            np.testing.assert_allclose(found[path][at], alone, atol=2e-5)


def test_muon_zero_gradient_is_a_zero_update():
    params = draw(0, MODEL)
    zero = jax.tree.map(jnp.zeros_like, params)
    o = optim(optimizer="muon", weight_decay=0.0, eps=0.0, muon_normalize=True)
    found = flat(run(make_optimizer(o, params), params, [zero])[0])["blocks/0/mlp/up/kernel"]
    np.testing.assert_array_equal(found, flat(params)["blocks/0/mlp/up/kernel"])


def test_normalize_rows_evens_out_rows_and_keeps_the_norm():
    u = jnp.asarray(
        np.random.default_rng(0).standard_normal((2, 6, 15)) * np.geomspace(1, 100, 15), jnp.float32
    )
    tx = muon.normalize_rows(0.0)
    found, _ = tx.update(u, tx.init(u))
    columns = np.sqrt(np.sum(np.square(found), axis=-2))
    np.testing.assert_allclose(columns, np.broadcast_to(columns[:, :1], columns.shape), rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=(1, 2)), np.linalg.norm(u, axis=(1, 2)), rtol=1e-5
    )


def test_cautious_decay_spares_opposite_signs():
    tx = muon.add_decay(0.5, cautious=True)
    update = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    weight = jnp.array([[2.0, 2.0, -2.0, -2.0]])
    found, _ = tx.update(update, tx.init(weight), weight)
    np.testing.assert_allclose(found, [[2.0, -1.0, 1.0, -2.0]])


def test_decay_follows_the_cosine_to_zero():
    tx = muon.add_decay(0.5, end=4)
    weight = jnp.ones((1, 1))
    state = tx.init(weight)
    seen = []
    for _ in range(6):
        update, state = tx.update(jnp.zeros((1, 1)), state, weight)
        seen.append(float(update[0, 0]))
    np.testing.assert_allclose(
        seen, [0.5, 0.25 * (1 + np.sqrt(0.5)), 0.25, 0.25 * (1 - np.sqrt(0.5)), 0, 0], atol=1e-7
    )
    with pytest.raises(UsageError, match=r"config\.optim\.decay_steps = 0.*muon_decay_to_zero"):
        make_optimizer(
            optim(
                optimizer="muon",
                schedule="constant",
                decay_steps=0,
                warmup_steps=0,
                muon_decay_to_zero=True,
            ),
            draw(0, MODEL),
        )


# --- groups

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


def test_ema():
    params = [draw(seed, MODEL) for seed in range(4)]
    ema = ema_init(params[0])
    for p in params[1:]:
        ema = jax.jit(ema_update, static_argnums=2)(ema, p, 0.9)
    assert_close(
        ema, jax.tree.map(lambda a, b, c, d: 0.729 * a + 0.081 * b + 0.09 * c + 0.1 * d, *params)
    )
    same = jax.tree.map(jnp.asarray, params[0])
    assert all(
        a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(ema_init(same)), strict=False)
    )


# --- 8 devices


def like_its_parameter(state, params) -> list[str]:
    """Paths of state arrays that are cut otherwise than their parameter.

    The paths of parameters without state are among them.
    """
    wrong = []
    seen = set()
    specs = {path: (p.shape, tuple(p.sharding.spec)) for path, p in flat(params).items()}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        for path, (shape, spec) in specs.items():
            # A size of 1 is a placeholder of Adafactor.
            if name.endswith(path) and leaf.shape != (1,) and leaf.shape[1:] != (1,):
                seen.add(path)
                kept = [axis for n, axis in zip(shape, spec, strict=False) if n in leaf.shape]
                found = [
                    axis
                    for n, axis in zip(leaf.shape, tuple(leaf.sharding.spec), strict=False)
                    if n > 1
                ]
                wrong += [f"{name} {found} {kept}"] if found != kept else []
    return wrong + sorted(specs.keys() - seen)


def on_eight_devices():
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    report = {}

    def place(tree):
        return nest(
            {
                path: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*SHAPES[path][1])))
                for path, x in flat(tree).items()
            }
        )

    # Cautious decay looks at the sign of the update, and where that is rounding the sign is too:
    # one entry that flips is off by rate * decay. It works entry by entry, whatever the layout.
    smooth = MODERN | dict(muon_cautious=False)
    for name in OPTIMIZERS:
        o = optim(optimizer=name, **smooth)
        params = draw(0, MODEL)
        grads = gradients(MODEL)
        expected = run(make_optimizer(o, params), params, grads)[0]
        with jax.set_mesh(mesh):
            sharded = place(params)
            tx = make_optimizer(o, sharded)
            wrong = like_its_parameter(jax.jit(tx.init)(sharded), sharded)
            found, state = run(tx, sharded, [place(g) for g in grads])
            wrong += like_its_parameter(state, sharded)
            wrong += [
                path
                for path, x in flat(found).items()
                if x.sharding != flat(sharded)[path].sharding
            ]
        errors = [
            np.max(np.abs(np.asarray(x) - flat(expected)[path])) for path, x in flat(found).items()
        ]
        report[name] = {"error": float(max(errors)), "wrong": wrong}
    print(json.dumps(report))


@pytest.fixture(scope="module")
def eight_devices():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_is_unsharded(eight_devices, name):
    assert eight_devices[name]["error"] < 1e-5
    assert eight_devices[name]["wrong"] == []


if __name__ == "__main__":
    on_eight_devices()


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_moments_in_bfloat16(name):
    """The first moment takes half of its bytes, and the updates stay those of float32 nearly."""
    grads = gradients(MODEL)
    params = draw(0, MODEL)
    found = {}
    for dtype in ("float32", "bfloat16"):
        tx = make_optimizer(optim(optimizer=name, moment_dtype=dtype), params)
        found[dtype] = run(tx, params, grads)

    def list_dtypes(state):
        return sorted({leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim})

    assert list_dtypes(found["float32"][1]) == ["float32"]
    wanted = {"adamw": ["bfloat16", "float32"], "lion": ["bfloat16"]}
    assert list_dtypes(found["bfloat16"][1]) == wanted[name]

    changes = {
        dtype: np.concatenate(
            [
                np.ravel(new - old)
                for new, old in zip(*map(jax.tree.leaves, (end, params)), strict=True)
            ]
        )
        for dtype, (end, _) in found.items()
    }
    apart = np.abs(changes["bfloat16"] - changes["float32"])
    assert apart.max() > 0
    assert apart.mean() < 0.02 * np.abs(changes["float32"]).mean()


def test_the_decay_of_averages_warms_up():
    steady = config.Train(ema=0.9)
    warming = config.Train(ema=0.9, ema_warmup=True)
    assert optimizer.ema_decay(steady, jnp.int32(0)) == 0.9
    found = [float(optimizer.ema_decay(warming, jnp.int32(step))) for step in (0, 5, 80, 81, 1000)]
    np.testing.assert_allclose(found, [0.1, 6 / 15, 0.9, 0.9, 0.9], rtol=1e-6)


@pytest.mark.parametrize("inputs, outputs", [(64, 16), (16, 64), (32, 32)])
def test_muons_scale_of_adam(inputs, outputs):
    """The root mean square of an orthogonal update becomes 0.2, whatever its shape is."""
    wide = np.linalg.qr(np.random.default_rng(0).standard_normal((max(inputs, outputs),) * 2))[0]
    update = {"kernel": jnp.asarray(wide[:inputs, :outputs], jnp.float32)}
    tx = muon.scale_by_shape("adam")
    scaled, _ = tx.update(update, tx.init(update))
    assert float(jnp.sqrt(jnp.mean(jnp.square(scaled["kernel"])))) == pytest.approx(0.2, rel=1e-5)
