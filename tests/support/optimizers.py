"""Optimisers for tests, with random parameters and gradients, and steps of them."""

import jax
import numpy as np
import optax

from gpt_jax import config
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.train.optim import groups as optim_groups, optimizer

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
    """The optimiser of `knobs` for parameters of the model."""
    return optimizer.make_optimizer(knobs, params, describe_parameter, **others)


def assign(knobs, params):
    """{path: index of its group}."""
    return optim_groups.assign(knobs, params, describe_parameter)


def describe_groups(knobs, params, **others):
    """A row for every group that has parameters."""
    return optim_groups.describe_groups(knobs, params, describe_parameter, **others)


def nest(flat):
    """A tree of the leaves of {path: leaf}."""
    tree = {}
    for path, leaf in flat.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = leaf
    return tree


def flat(tree):
    """{path: leaf} of a tree."""
    return {
        "/".join(k.key for k in keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def draw(seed, shapes, scale=1.0):
    """A tree of normal draws in float32."""
    random = np.random.default_rng(seed)
    return nest(
        {
            path: (scale * random.standard_normal(shape)).astype(np.float32)
            for path, shape in shapes.items()
        }
    )


def optim(**knobs):
    """Settings of a short schedule with decay, a few fields changed."""
    return config.Optim(
        **{"learning_rate": 0.02, "warmup_steps": 2, "decay_steps": 8, "weight_decay": 0.1, **knobs}
    )


def gradients(shapes, steps=5):
    """A tree of gradients for each step."""
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
    """Raises AssertionError with the path of a leaf that differs."""
    found = flat(tree)
    expected = flat(expected)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=rtol, atol=atol, err_msg=path)
