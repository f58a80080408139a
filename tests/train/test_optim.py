"""Optimisers against plain numpy, stacked against separate, and averages of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import (
    MODEL,
    MODERN,
    OPTIMIZERS,
    assert_close,
    draw,
    flat,
    gradients,
    make_optimizer,
    nest,
    optim,
    run,
)

from gpt_jax import config
from gpt_jax.train.optim import optimizer
from gpt_jax.train.optim.optimizer import ema_init, ema_update
from gpt_jax.train.optim.schedule import make_schedule


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
