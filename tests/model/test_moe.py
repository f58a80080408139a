"""The mixture of experts against a loop over tokens, and the rule of the router's bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_layers import (
    CASES,
    D,
    T,
    close,
    compiled,
    make_inputs,
    make_model,
    make_params,
    objective,
    run,
)

from gpt_jax import config
from gpt_jax.model.experts import exchange
from gpt_jax.model.experts.balance import add_layer, empty_report
from gpt_jax.model.experts.moe import Moe
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.train.optim.optimizer import make_optimizer

ACTIVATIONS = {"swiglu": lambda x: x / (1 + jnp.exp(-x)), "relu2": lambda x: jnp.maximum(x, 0) ** 2}


def loop_ffn(model, p, x, expert=...):
    up = x @ p["up"]["kernel"][expert]
    act = ACTIVATIONS[model.expert_ffn]
    hidden = act(x @ p["gate"]["kernel"][expert]) * up if "gate" in p else act(up)
    return hidden @ p["down"]["kernel"][expert]


def loop_row(model, params, x, segment):
    """One row [T, D], one token and one choice at a time."""
    E = model.experts
    k = model.experts_per_token
    room = -(-T * k * model.capacity_factor // E) if model.dispatch == "capacity" else T
    taken = [0] * E
    load = np.zeros(E)
    dropped = 0
    ys = []
    z = 0.0
    probability = jnp.zeros(E)
    for t in range(T):
        logits = x[t] @ params["router"]["kernel"]
        scores = (
            jnp.exp(logits) / jnp.exp(logits).sum()
            if model.router == "softmax"
            else 1 / (1 + jnp.exp(-logits))
        )
        ranked = np.asarray(jax.lax.stop_gradient(scores + params["router"].get("bias", 0.0)))
        chosen = sorted(range(E), key=lambda e: (-ranked[e], e))[:k]
        y = loop_ffn(model, params["shared"], x[t]) if model.shared_experts else jnp.zeros(D)
        if segment[t]:
            z = z + jnp.log(jnp.exp(logits).sum()) ** 2
            probability = probability + scores / scores.sum()
            whole = sum(scores[e] for e in chosen) if model.router_normalize else 1.0
            for e in chosen:
                load[e] += 1
                if taken[e] < room:
                    taken[e] += 1
                    y = y + scores[e] / whole * loop_ffn(model, params["experts"], x[t], e)
                else:
                    dropped += 1
        ys.append(y)
    real = max(1, (segment != 0).sum())
    stats = {
        "balance": real * E * (load / (real * k) * probability / real).sum(),
        "router_z": z,
        "load": load,
        "dropped": dropped,
    }
    if "bias" in params["router"]:
        bias = params["router"]["bias"]
        stats["steer"] = ((bias - jax.lax.stop_gradient(bias)) * (E * load - load.sum())).sum()
    return jnp.stack(ys), stats


def loop(model, params, x, segment, probe):
    def total(params, x):
        rows = [loop_row(model, params, x[b], segment[b]) for b in range(len(x))]
        y = jnp.stack([row[0] for row in rows])
        stats = {
            name: jnp.stack([jnp.asarray(row[1][name], jnp.float32) for row in rows])
            for name in rows[0][1]
        }
        return objective(y, stats, probe), (y, stats)

    grads, (y, stats) = jax.grad(total, (0, 1), has_aux=True)(
        jax.tree.map(jnp.asarray, params), jnp.asarray(x)
    )
    return jax.tree.map(np.asarray, (y, stats, grads))


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens(name):
    model = make_model(**CASES[name])
    params, (x, segment, probe) = make_params(model), make_inputs(rows=3)
    ours = run(model, params, x, segment, probe)
    theirs = loop(model, params, x, segment, probe)
    close(ours, theirs)
    assert ours[1]["dropped"].sum() > 0 or model.dispatch == "dropless"
    assert ours[1]["load"].sum() == model.experts_per_token * (segment != 0).sum()


def test_what_is_dropped_is_reported_as_a_part_of_the_choices():
    """A token has two choices, and experts take half of an equal share.

    So about half of all choices are left out.
    """
    model = make_model(
        experts=4, experts_per_token=2, dispatch="capacity", capacity_factor=0.5, balance="none"
    )
    x, segment, probe = make_inputs()
    _, stats, _ = run(model, make_params(model), x, segment, probe)
    report = add_layer(empty_report(model, len(x)), stats, model, 0)
    found = report["dropped"].sum() / report["tokens"].sum()
    assert (
        found == pytest.approx(stats["dropped"].sum() / stats["load"].sum()) and 0.4 < found < 0.6
    )


def test_capacity_with_room_for_all_drops_nothing():
    knobs = dict(experts=4, experts_per_token=2, balance="bias")
    free = make_model(**knobs)
    roomy = make_model(**knobs, dispatch="capacity", capacity_factor=2.0)
    params = make_params(free, skew=1.0)
    inputs = make_inputs()
    close(run(roomy, params, *inputs), run(free, params, *inputs))


def test_capacity_is_rounded_up_and_no_more_than_a_row():
    cases = {
        (8, 4, 2, 1.25): 5,
        (100, 4, 2, 1.1): 55,
        (8, 64, 1, 0.5): 1,
        (8, 8, 3, 0.75): 3,
        (8, 2, 2, 3.0): 8,
    }
    assert {args: exchange.capacity(*args) for args in cases} == cases


def test_padding_is_in_no_statistic_and_takes_no_room():
    model = make_model(dispatch="capacity", capacity_factor=0.5, balance="bias")
    params, (x, segment, probe) = make_params(model), make_inputs()
    garbage = np.where((segment == 0)[..., None], 1e3, x)
    (y, stats, _), (y_plain, stats_plain, _) = (
        run(model, params, x, segment, probe) for x in (garbage, x)
    )
    close(stats, stats_plain)
    close(y, y_plain)
    assert (
        stats["load"][2].sum() == stats["balance"][2] == stats["router_z"][2] == 0
        and np.abs(y[2]).max() == 0
    )


def test_equal_scores_go_to_the_lower_experts():
    model = make_model(experts=8, experts_per_token=3)
    params = make_params(model)
    params["router"]["kernel"][:] = 0
    _, stats, _ = run(model, params, *make_inputs())
    assert (stats["load"][1] == [T, T, T, 0, 0, 0, 0, 0]).all()


@pytest.mark.parametrize("init", ["gpt2", "xavier", "modern"])
def test_experts_start_like_dense_layers(init):
    model = make_model(init=init, experts=64, layers=1)
    make = jax.jit(lambda key: Moe(model).init(key, jnp.zeros((1, 1, D)), None)["params"])
    params = make(jax.random.key(0))
    up, down = (np.asarray(params["experts"][name]["kernel"]) for name in ("up", "down"))
    F = model.expert_mlp
    xavier = (2 / (D + F)) ** 0.5
    expected = {
        "gpt2": (0.02, 0.02 / 2**0.5),
        "xavier": (xavier, xavier),
        "modern": (0.4 * D**-0.5, 0.0),
    }
    np.testing.assert_allclose((up.std(), down.std()), expected[init], rtol=0.03)
    assert np.abs(up[0] - up[1]).max() > 0


def test_the_bias_balances_a_skewed_router():
    model = make_model(balance="bias", router="sigmoid", experts=8, experts_per_token=2)
    params = make_params(model, skew=0.3)
    inputs = make_inputs()
    tx = make_optimizer(
        config.Optim(learning_rate=0.0, schedule="constant"),
        params,
        describe_parameter,
        balance_rate=0.05,
    )
    state = tx.init(params)
    worst = []
    step = compiled(model)
    for _ in range(20):
        _, stats, (grads, _) = step(params, *inputs)
        load = np.asarray(stats["load"]).sum(0)
        worst.append(load.max() / load.mean())
        np.testing.assert_array_equal(grads["router"]["bias"], model.experts * load - load.sum())
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    assert worst[0] > 2 and max(worst[-3:]) < 1.5, worst
