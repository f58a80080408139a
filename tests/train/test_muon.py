"""Muon against plain numpy, with its scales and its decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import MODEL, MODERN, assign, draw, flat, gradients, make_optimizer, optim, run

from gpt_jax.errors import UsageError
from gpt_jax.train.optim import muon
from gpt_jax.train.optim.schedule import make_schedule


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


@pytest.mark.parametrize("inputs, outputs", [(64, 16), (16, 64), (32, 32)])
def test_muons_scale_of_adam(inputs, outputs):
    """The root mean square of an orthogonal update becomes 0.2, whatever its shape is."""
    wide = np.linalg.qr(np.random.default_rng(0).standard_normal((max(inputs, outputs),) * 2))[0]
    update = {"kernel": jnp.asarray(wide[:inputs, :outputs], jnp.float32)}
    tx = muon.scale_by_shape("adam")
    scaled, _ = tx.update(update, tx.init(update))
    assert float(jnp.sqrt(jnp.mean(jnp.square(scaled["kernel"])))) == pytest.approx(0.2, rel=1e-5)
