"""Rotary positions in two ways, by slices and by a matmul, and the choice between them.

Shapes: B batch, T sequence, N heads, H head_dim, R rotating channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import list_equations, trace

from gpt_jax import config, sharding
from gpt_jax.model.layers import positions
from gpt_jax.model.remat import REMATS

B, T, N = 4, 6, 4
WAYS = {"slices": positions.rotate_by_slices, "matmul": positions.rotate_by_matmul}


def draw(H: int, R: int, dtype=jnp.bfloat16):
    """Draws x and a gradient [B, T, N, H], and angles [B, T, R / 2] of many turns."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = (jax.random.normal(key, (B, T, N, H), dtype) for key in keys[:2])
    angles = jax.random.uniform(keys[2], (B, T, R // 2), maxval=1000.0)
    return x, gradient, (jnp.cos(angles), jnp.sin(angles))


def rotate_with_gradient(way: str, x, gradient, angles):
    turned, transpose = jax.vjp(lambda x: WAYS[way](x, *angles), x)
    return turned, *transpose(gradient)


def count_dots(function, *arguments) -> int:
    equations = trace(function, *arguments)
    return sum(equation.primitive.name == "dot_general" for equation in equations)


@pytest.mark.parametrize("H, R", [(16, 16), (16, 4), (128, 128)])
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(f, static_argnums=0)])
def test_a_matmul_rotates_to_the_bit_as_slices_do(H, R, wrap):
    by_slices, by_matmul = (wrap(rotate_with_gradient)(way, *draw(H, R)) for way in WAYS)
    for ours, theirs in zip(by_matmul, by_slices, strict=True):
        np.testing.assert_array_equal(np.float32(ours), np.float32(theirs))
    assert (by_matmul[0] != draw(H, R)[0]).any()


def test_so_it_does_on_a_mesh(mesh):
    """Heads are cut over the axis tensor, and the result stays where its input lies."""
    inputs = draw(16, 8)
    axes = "batch", "seq", "heads", "head_dim"

    @jax.jit
    def rotate_here(x, gradient, angles):
        x = sharding.constrain(x, *axes)
        gradient = sharding.constrain(gradient, *axes)
        return rotate_with_gradient("matmul", x, gradient, angles)

    with jax.set_mesh(mesh(1, 2, 2)):
        on_mesh = rotate_here(*inputs)
        spec = sharding.used_spec(*axes)
    for ours, theirs in zip(on_mesh, rotate_with_gradient("slices", *inputs), strict=True):
        assert ours.sharding.spec == spec
        np.testing.assert_array_equal(np.float32(ours), np.float32(theirs))


@pytest.mark.parametrize(
    "platform, dtype, dots", [("tpu", "bfloat16", 1), ("tpu", "float32", 0), ("gpu", "bfloat16", 0)]
)
def test_only_bfloat16_on_tpus_rotates_by_a_matmul(platform, dtype, dots, monkeypatch):
    """A TPU's matmul would round float32."""
    monkeypatch.setattr(sharding, "habits", lambda: config.find_habits(platform))
    x, _, angles = draw(16, 16, jnp.dtype(dtype))
    assert count_dots(lambda x: positions.rotate(x, *angles), x) == dots


def test_remat_dots_does_not_keep_the_matmul_of_a_rotation():
    """It is as large as queries, and costs next to nothing."""
    is_kept = REMATS["dots"](config.Compute())
    x, _, angles = draw(16, 16)
    weight = jnp.ones((16, 16), x.dtype)

    def project_and_rotate(x):
        return positions.rotate_by_matmul(x @ weight, *angles)

    equations = list_equations(jax.make_jaxpr(project_and_rotate)(x).jaxpr)
    kept = [
        bool(is_kept(equation.primitive, *(v.aval for v in equation.invars), **equation.params))
        for equation in equations
        if equation.primitive.name == "dot_general"
    ]
    assert kept == [True, False]
