"""The mixture of experts on meshes, in the stages of a pipeline and as on other platforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_layers import CASES, D, close, make_inputs, make_model, make_params, objective, run
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec as P
from programs import trace

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.experts import grouped_matmuls, local_experts
from gpt_jax.model.experts.moe import Moe
from gpt_jax.sharding import layout, rules


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
        grouped_matmuls, "kernel_gradient", partial(grouped_matmuls.kernel_gradient, interpret=True)
    )
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)


@pytest.fixture
def hopper(monkeypatch):
    """The exchange of GPUs, and the grouped matmul of some of them."""
    habits = config.find_habits("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        sharding, "habits", lambda: config.choose_expert_matmul("grouped", habits, "")
    )
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)


GROUPED_CASES = [
    ("shared", {}),
    ("normalised", dict(expert=4)),
    ("sigmoid-bias", dict(expert=2, fsdp=2, tensor=2)),
]


@pytest.mark.parametrize("name, shape", GROUPED_CASES, ids=str)
def test_the_grouping_of_gpus_equals_blocks(name, shape, mesh, hopper, monkeypatch):
    """Rows of no expert are NaN in its results, and so are rows that no device sent."""
    model = make_model(**CASES[name] | dict(expert_mlp=32))
    params = make_params(model, skew=0.5)
    inputs = make_inputs()
    if shape:
        grouped = on_mesh(mesh(**shape), model, params, *inputs)
    else:
        grouped = run(model, params, *inputs)
    monkeypatch.undo()
    close(grouped, run(model, params, *inputs))


def test_a_layer_multiplies_as_its_config_asks(monkeypatch):
    """Blocks are what GPUs take by themselves."""
    habits = config.find_habits("gpu", "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(sharding, "habits", lambda: habits)
    model = make_model(expert_mlp=32)
    params = make_params(model)
    x, segment, _ = make_inputs()

    def count_kernels(asked):
        module = Moe(model, config.Compute(expert_matmul=asked))
        equations = trace(lambda x: module.apply({"params": params}, x, segment)[0], x)
        return sum(equation.primitive.name == "pallas_call" for equation in equations)

    assert [count_kernels(asked) for asked in ("auto", "blocks", "grouped")] == [0, 0, 3]
    with pytest.raises(UsageError, match="'sorted': gpu does not have it; choose auto or blocks"):
        count_kernels("sorted")


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


@pytest.mark.parametrize("way", ["blocks", "sorted", "grouped"])
def test_sums_of_bfloat16_are_float32(way, request):
    """Gradients are sums over 40 blocks of 8 rows and more, which a sum in bfloat16 would lose.

    One expert is chosen by nobody, and some choices are of no expert.
    """
    if way != "blocks":
        request.getfixturevalue({"sorted": "accelerator", "grouped": "hopper"}[way])
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
