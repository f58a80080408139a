"""Layers of experts with their parameters and inputs, and a number that needs every output."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config
from gpt_jax.model.experts.moe import Moe

B = 8
T = 8
D = 16
BASE = dict(
    embed=D,
    experts=4,
    experts_per_token=2,
    expert_mlp=8,
    bias=False,
    pattern=(("attention", "moe"),),
)
CASES = {
    "plain": dict(balance="none", router_normalize=False),
    "normalised": dict(balance="aux"),
    "sigmoid-bias": dict(balance="bias", router="sigmoid", experts=8, experts_per_token=3),
    "shared": dict(shared_experts=2, expert_ffn="relu2", router="sigmoid", router_normalize=False),
    "capacity": dict(dispatch="capacity", capacity_factor=0.5),
    "capacity-bias": dict(
        dispatch="capacity", capacity_factor=0.75, balance="bias", experts=8, shared_experts=1
    ),
}


def make_model(**knobs):
    """A small model of experts with a few fields changed."""
    return config.resolve(config.Config(model=config.Model(**BASE | knobs))).model


def make_params(model, skew=0.0):
    """Normal draws in numpy, the same on every mesh.

    `skew` makes the first experts the favourites.
    """
    shapes = jax.eval_shape(lambda: Moe(model).init(jax.random.key(0), jnp.zeros((1, 1, D)), None))[
        "params"
    ]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(0.4 * rng.standard_normal(x.shape)), shapes)
    params["router"]["kernel"][0] -= skew * np.arange(model.experts)
    return params


def make_inputs(rows=B):
    """(x [rows, T, D], segment [rows, T] with padding, probe [rows, T, D])."""
    rng = np.random.default_rng(1)
    x, probe = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))
    x[..., 0] = 1.0
    segment = np.ones((B, T), np.int32)
    segment[0, 5:], segment[2], segment[5, :2] = 0, 0, 0
    return x[:rows], segment[:rows], probe[:rows]


def objective(y, stats, probe):
    """A number in which every output has a part."""
    parts = 0.3 * stats["balance"] + 0.1 * stats["router_z"] + stats.get("steer", 0.0)
    return (y * probe).sum() + parts.sum()


def compiled(model):
    """(params, x, segment, probe) -> (y, stats, gradients of parameters and x)."""

    def both(params, x, segment, probe):
        def total(params, x):
            y, stats = Moe(model).apply({"params": params}, x, segment)
            return objective(y, stats, probe), (y, stats)

        grads, (y, stats) = jax.grad(total, (0, 1), has_aux=True)(params, x)
        return y, stats, grads

    return jax.jit(both)


def run(model, *args):
    """What `compiled` gives, in numpy."""
    return jax.tree.map(np.asarray, compiled(model)(*args))


def close(ours, theirs, rel=1e-5):
    """Raises AssertionError if a leaf differs by more than `rel` of its largest entry."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rel * max(np.abs(b).max(), 1e-2))
