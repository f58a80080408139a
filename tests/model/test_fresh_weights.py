"""How fresh weights are spread, by role and over depth."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from variants import make_model

from gpt_jax.model.parametrization import make_init, residual_ramp
from gpt_jax.model.transformer import init_params


@pytest.mark.parametrize(
    "init, role, std",
    [
        ("gpt2", "qkv", 0.02),
        ("gpt2", "embed", 0.02),
        ("gpt2", "mlp_out", 0.02 / math.sqrt(6)),
        ("gpt2", "attention_out", 0.02 / math.sqrt(6)),
        ("xavier", "mlp_in", math.sqrt(2 / 384)),
        ("xavier", "embed", 1 / 8),
        ("modern", "embed", 0.8),
        ("modern", "head", 0.001),
        ("modern", "qkv", 1 / 8),
        ("modern", "mlp_in", 0.4 / 8),
        ("modern", "attention_out", 0.0),
        ("modern", "mlp_out", 0.0),
        ("modern", "gate", 0.0),
    ],
)
def test_spread_of_fresh_weights(init, role, std):
    weights = make_init(role, make_model(init=init, embed=64))(
        jax.random.key(0), (128, 256), jnp.float32
    )
    assert (
        float(weights.std()) == pytest.approx(std, rel=0.02)
        and abs(float(weights.mean())) <= 0.02 * std
    )


@pytest.mark.parametrize(
    "init, wanted",
    [
        (
            "gpt2",
            {
                "embed/table": 0.02,
                "q/kernel": 0.02,
                "up/kernel": 0.02,
                "out/kernel": 0.02 / 2,
                "down/kernel": 0.02 / 2,
                "value_embed/table": 0.02,
                "head/kernel": 0.02,
            },
        ),
        (
            "modern",
            {
                "embed/table": 0.8,
                "q/kernel": 1 / 8,
                "up/kernel": 0.4 / 8,
                "out/kernel": 0,
                "down/kernel": 0,
                "value_embed/table": 1 / 8,
                "value_gate/kernel": 0,
                "head/kernel": 0.001,
            },
        ),
    ],
)
def test_fresh_weights_are_spread_by_their_role(init, wanted):
    """Residual projections are small or zero. Embedding and head have a spread of their own."""
    model = make_model("modern", layers=2, embed=64, vocab=128, windows=(0,), init=init)
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    )
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(x.std()) for path, x in leaves
    }
    for end, std in wanted.items():
        ours = [value for path, value in found.items() if f"/{path}".endswith(f"/{end}")]
        assert ours == pytest.approx([std] * len(ours), rel=0.05) and ours, end


def test_fresh_layers_differ_and_ramps_run_over_depth():
    model = make_model("modern", layers=4, windows=(0,), value_embed=False)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    first, second = params["blocks"]["0"]["attention"]["q"]["kernel"][:2]
    assert (first != second).mean() > 0.99
    np.testing.assert_allclose(
        params["residual"]["x"], [1.15, 1.15 - 1 / 30, 1.05 + 1 / 30, 1.05], rtol=1e-6
    )
    np.testing.assert_allclose(residual_ramp(0.2, 0.05)(None, (3,)), [0.2, 0.125, 0.05], rtol=1e-6)
