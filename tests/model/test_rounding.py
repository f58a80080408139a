"""In bfloat16 a result is rounded once, and no factor is rounded before it multiplies.

Each part is compared with the same formula in float64 of the same bfloat16 inputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.model.attention.attend import scale_queries
from gpt_jax.model.attention.attention import QkNorm
from gpt_jax.model.layers.dropout import dropout
from gpt_jax.model.layers.extras import add_scaled


def draw(*shape, seed=0):
    values = np.random.default_rng(seed).uniform(1, 2, shape)
    return jnp.asarray(values, jnp.bfloat16)


def wide(x):
    return np.asarray(x, np.float64)


def assert_rounded_once(result, exact):
    """All but a few ties, which float32 may decide in another way, are the nearest bfloat16."""
    assert result.dtype == jnp.bfloat16
    nearest = exact.astype(jnp.bfloat16).astype(np.float64)
    assert (wide(result) == nearest).mean() > 0.99


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_mean(rate):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dropout(self, x, rate)

    x = draw(8, 256, 64)
    y = Layer().apply({}, x, rngs={"dropout": jax.random.key(0)})
    kept = wide(y) != 0
    assert abs(kept.mean() - (1 - rate)) < 0.01
    assert_rounded_once(y[kept], wide(x)[kept] / (1 - rate))


@pytest.mark.parametrize("norm", ["rmsnorm", "plain_rmsnorm"])
def test_qk_scale_is_exact(norm):
    model = config.Model(norm=norm, qk_scale=1.2)
    layer = QkNorm(model)
    x = draw(2, 32, 4, 64)
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    norms = np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + model.norm_epsilon)
    assert_rounded_once(y, 1.2 * wide(x) / norms)


@pytest.mark.parametrize("head_dim", [48, 64, 112])
def test_queries_are_scaled_exactly(head_dim):
    q = draw(2, 64, 4, head_dim)
    assert_rounded_once(scale_queries(q), wide(q) / head_dim**0.5)


@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_learned_scalars_are_not_rounded(scale):
    x = draw(4, 64, 32)
    y = draw(4, 64, 32, seed=1)
    exact = wide(x) + np.float32(scale).astype(np.float64) * wide(y)
    assert_rounded_once(add_scaled(x, jnp.full(1, scale), y), exact)
