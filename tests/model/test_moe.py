"""The mixture of experts against a loop over tokens.

It runs on meshes and in the stages of a pipeline. The rule of the router's bias is here too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax import config, sharding
from gpt_jax.model.experts import exchange, local_experts
from gpt_jax.model.experts.balance import add_layer, empty_report
from gpt_jax.model.experts.moe import Moe
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.sharding import layout, rules
from gpt_jax.train.optim.optimizer import make_optimizer

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
    return jax.tree.map(np.asarray, compiled(model)(*args))


def close(ours, theirs, rel=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rel * max(np.abs(b).max(), 1e-2))


# ---- the loop ----

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


# ---- the other platforms' ways, on this one ----


def emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all documents, made of gathers, because a CPU does not have it."""
    me = jax.lax.axis_index(axis_name)
    gather = partial(jax.lax.all_gather, axis_name=axis_name)
    everything, starts, sizes, ends = (
        gather(x) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    for source in range(len(starts)):
        place = jnp.arange(len(output)) - ends[source, me]
        here = (place >= 0) & (place < sizes[source, me])
        sent = everything[source][(starts[source, me] + place).clip(0, len(operand) - 1)]
        output = jnp.where(here[:, None], sent, output)
    # Otherwise a device would wait, or take too little.
    return jnp.where((recv_sizes == sizes[:, me]).all(), output, jnp.nan)


@pytest.fixture
def accelerator(monkeypatch):
    """The exchange and the grouped matmul of platforms that are no CPU."""
    monkeypatch.setattr(sharding, "habits", lambda: config.find_habits("tpu"))
    monkeypatch.setattr(
        local_experts, "kernel_gradient", partial(local_experts.kernel_gradient, interpret=True)
    )
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)


def test_the_ragged_exchange_equals_the_padded_one(mesh, accelerator, monkeypatch):
    model = make_model(experts=8, experts_per_token=3)
    params = make_params(model, skew=0.5)
    inputs = make_inputs()
    ragged = on_mesh(mesh(expert=4), model, params, *inputs)
    monkeypatch.undo()
    close(ragged, run(model, params, *inputs))


def test_the_grouping_of_tpus_equals_blocks(accelerator, monkeypatch):
    """It is `ragged_dot`, with megablox's tgmm (interpreted) in the place of its transpose."""
    model = make_model(experts=8)
    params = make_params(model, skew=0.5)
    inputs = make_inputs()
    sorted_ = run(model, params, *inputs)
    monkeypatch.undo()
    close(sorted_, run(model, params, *inputs))


@pytest.mark.parametrize("way", ["blocks", "sorted"])
def test_sums_of_bfloat16_are_float32(way, request):
    """Gradients are sums over 40 blocks of 8 rows and more, which a sum in bfloat16 would lose.

    One expert is chosen by nobody, and some choices are of no expert.
    """
    if way == "sorted":
        request.getfixturevalue("accelerator")
    rng = np.random.default_rng(0)
    n = 640
    count = 4

    def draw(*shape):
        return jnp.asarray(rng.uniform(0.5, 1.0, shape), jnp.bfloat16)

    x = draw(n, 128)
    probe = draw(n, 128)
    kernels = local_experts.Kernels(*(draw(count, *shape) / 64 for shape in ((128, 128),) * 3))
    choice = jnp.asarray(rng.choice([0, 0, 0, 1, 2, count], n))

    def ours(x, kernels):
        done = local_experts.feed_forward(x, choice, 1, kernels, jax.nn.silu, sharding.habits(), 32)
        return (
            local_experts.combine(done.rows, jnp.ones((n, 1)), done.there, done.back) * probe
        ).sum(dtype=jnp.float32)

    def dense(x, kernels):
        down, up, gate = (
            jnp.take(kernel, choice, axis=0, mode="fill", fill_value=0) for kernel in kernels
        )
        times = partial(jnp.einsum, "nd,ndf->nf")
        return (times(jax.nn.silu(times(x, gate)) * times(x, up), down) * probe).sum()

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, kernels)
    close(wide(found), jax.value_and_grad(dense, (0, 1))(*wide((x, kernels))), rel=1e-2)


# ---- meshes ----

MESHES = [
    ("sigmoid-bias", dict(expert=8)),
    ("sigmoid-bias", dict(expert=2, fsdp=2, tensor=2)),
    ("shared", dict(expert=2, data=2, context=2)),
    ("capacity-bias", dict(expert=4, data=2)),
]


def put(params, model):
    """Parameters laid out as the module makes them on the current mesh."""
    like = jax.eval_shape(lambda: Moe(model).init(jax.random.key(0), zeros_on_mesh(), None))[
        "params"
    ]
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, like: jax.device_put(x, NamedSharding(mesh, like.sharding.spec)), params, like
    )


def zeros_on_mesh():
    return layout.constrain(jnp.zeros((8, 8, D)), "batch", "seq", None)


def on_mesh(mesh, model, params, x, segment, probe):
    def lay(x, *rest):
        return jax.device_put(x, NamedSharding(mesh, P(config.BATCH_AXES, "context", *rest)))

    with jax.set_mesh(mesh):
        return run(model, put(params, model), lay(x, None), lay(segment), lay(probe, None))


@pytest.mark.parametrize("name, shape", MESHES, ids=str)
def test_a_mesh_equals_one_device(name, shape, mesh):
    model = make_model(**CASES[name])
    params = make_params(model, skew=0.5)
    inputs = make_inputs()
    close(on_mesh(mesh(**shape), model, params, *inputs), run(model, params, *inputs))


STAGES = [
    ("normalised", dict(pipeline=2, expert=2, fsdp=2)),
    ("capacity-bias", dict(pipeline=2, expert=2, data=2)),
]


@pytest.mark.parametrize("name, shape", STAGES, ids=str)
def test_under_vmap_over_stages(name, shape, mesh, accelerator, monkeypatch):
    model = make_model(**CASES[name])
    inputs = make_inputs()
    two = [make_params(model), make_params(model, skew=1.0)]
    grid = mesh(**shape)
    with jax.set_mesh(grid):

        def over(spec):
            return NamedSharding(grid, P("pipeline", *spec))

        params = jax.tree.map(
            lambda *leaves: jax.device_put(np.stack(leaves), over(leaves[0].sharding.spec)),
            *(put(params, model) for params in two),
        )

        def lay(x):
            return jax.device_put(np.stack([x, x]), over([("data", "fsdp", "expert")]))

        @jax.jit
        def both(*args):
            with rules.using_rules(rules.STAGE):

                def stage(*args):
                    return Moe(model).apply({"params": args[0]}, *args[1:3])

                def total(params, x):
                    y, stats = jax.vmap(stage)(params, x, args[2])
                    return objective(y, stats, args[3]), (y, stats)

                return jax.grad(total, (0, 1), has_aux=True)(*args[:2])

        grads, (y, stats) = jax.tree.map(np.asarray, both(params, *map(lay, inputs)))
    monkeypatch.undo()
    apart = [run(model, params, *inputs) for params in two]
    close((y, stats, grads), jax.tree.map(lambda *leaves: np.stack(leaves), *apart))


# ---- the bias ----


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
