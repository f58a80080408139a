"""Moments in the memory of the host: the same steps, whatever the optimiser and the mesh."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from programs import trace

from gpt_jax import config, sharding, train
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.model.transformer import abstract_params
from gpt_jax.run.parts import make_steps
from gpt_jax.train.optim.optimizer import make_optimizer
from gpt_jax.train.optim.streaming import keep_on_host, split

STEPS = 3
OPTIMIZERS = {
    "adamw": config.Optim(optimizer="adamw"),
    "adafactor": config.Optim(optimizer="adafactor"),
    "muon": config.Optim(
        groups=(config.Group(match="blocks/.*kernel", optimizer="muon"),), clip=0.5
    ),
}


TINY = config.Config(
    model=config.Model(layers=2, embed=16, heads=2, vocab=meshes.VOCAB),
    compute=config.Compute(kernel="reference"),
    train=meshes.TRAIN,
)
JOBS = [("adamw", 4, 3), ("adamw", 4, 1), ("muon", 4, 3), ("adafactor", 1, 3)]


@cache
def make_run(memory: str, optimizer: str, fsdp: int, zero: int):
    """(functions of a run, its mesh) of a tiny model."""
    settings = replace(
        TINY,
        optim=replace(OPTIMIZERS[optimizer], state_memory=memory),
        mesh=config.Mesh(data=1, fsdp=fsdp, zero=zero),
    )
    mesh = sharding.make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
    return make_steps(config.resolve(settings), mesh), mesh


def make_batch(mesh) -> dict:
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    columns = meshes.make_columns("modern")
    return {
        name: jax.device_put(jnp.asarray(x, "float32" if name == "weight" else "int32"), place)
        for name, x in columns.items()
    }


def take_steps(memory: str, *job, state=None):
    """(state after STEPS updates, their losses); from the first state, or from a given one."""
    steps, mesh = make_run(memory, *job)
    with jax.set_mesh(mesh):
        batch = make_batch(mesh)
        state = steps.make_state() if state is None else state
        losses = []
        for _ in range(STEPS):
            state, sums = steps.train_step(state, batch)
            losses.append(float(sums["loss"][0]))
    return state, losses


def find_kinds(tree) -> set[str]:
    """The kinds of memory that arrays with entries lie in."""
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


@pytest.mark.parametrize("job", JOBS)
def test_where_moments_lie_changes_nothing(job):
    """The state keeps its memory through donated steps, and is described as it is."""
    plain, plain_losses = take_steps("device", *job)
    state, losses = take_steps("host", *job)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    abstract = make_run("host", *job)[0].abstract
    assert find_kinds(state.opt) == find_kinds(abstract.opt) == {sharding.HOST}
    assert find_kinds(plain.opt) == find_kinds(state.params) == {"device"}
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        assert x.sharding.memory_kind == (like.sharding.memory_kind or "device")


@pytest.mark.parametrize("before, after", [("device", "host"), ("host", "device")])
def test_a_run_resumes_with_its_moments_elsewhere(tmp_path, before, after):
    """A checkpoint does not know where moments lay. They are read to where they shall lie."""
    job = ("adamw", 4, 3)
    state, _ = take_steps(before, *job)
    steps, mesh = make_run(after, *job)
    with jax.set_mesh(mesh):
        saved = state._replace(params={}, ema={})
        checkpoints = train.open_checkpoints(tmp_path, config.Checkpoint(), lambda line: None)
        assert checkpoints.save(3, state.params, saved, {"note": "three"}, {})
        checkpoints.close()
        wanted = steps.abstract._replace(params={}, ema={})
        items = {"params": steps.abstract.params, "train": wanted}
        loaded = train.restore_checkpoint(tmp_path, 3, items)
    opt = loaded["train"].opt
    assert find_kinds(opt) == {sharding.HOST if after == "host" else "device"}

    _, resumed = take_steps(after, *job, state=loaded["train"]._replace(params=loaded["params"]))
    _, went_on = take_steps(before, *job, state=state)
    np.testing.assert_allclose(resumed, went_on, rtol=1e-6)


def test_moments_of_one_parameter_are_a_part_of_their_own():
    """Adam has two moments of each. Every equation is in one part."""
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_params(config.resolve(TINY).model))
    tx = make_optimizer(config.Optim(decay_steps=9), params, describe_parameter)

    def update(updates, state, params):
        updates, state = tx.update(updates, sharding.to_device(state), params)
        return updates, sharding.to_host(state)

    state = jax.jit(lambda params: sharding.to_host(tx.init(params)))(params)
    jaxpr = jax.make_jaxpr(update)(params, state, params).jaxpr
    first, *others = split(jaxpr)
    assert first.fetched == first.stored == []
    assert [len(part.fetched) for part in others] == [2] * len(jax.tree.leaves(params))
    assert [len(part.stored) for part in others] == [2] * len(jax.tree.leaves(params))
    assert sum(len(part.equations) for part in (first, *others)) == len(jaxpr.eqns)


def test_moments_that_a_rule_mixes_are_one_part():
    """Its equations are not computed once for each of them."""

    def update(gradient, moments):
        a, b, c = sharding.to_device(moments)
        return gradient, sharding.to_host((a + gradient, a * b, c + 1))

    moments = jax.jit(lambda: sharding.to_host((jnp.ones(2),) * 3))()
    jaxpr = jax.make_jaxpr(update)(jnp.ones(2), moments).jaxpr
    _, mixed, alone = split(jaxpr)
    assert mixed.fetched == jaxpr.invars[1:3]
    assert mixed.stored == jaxpr.outvars[1:3]
    assert (alone.fetched, alone.stored) == (jaxpr.invars[3:], jaxpr.outvars[3:])


def test_a_part_waits_for_the_one_before():
    """Each fence but the first holds what one part stores and what the next one fetches."""
    tx = keep_on_host(optax.scale_by_adam())
    params = [jnp.ones(2)] * 3
    state = jax.jit(tx.init)(params)
    program = trace(tx.update, params, state)
    fences = [e for e in program if e.primitive.name == "optimization_barrier"]
    assert [len(fence.invars) for fence in fences] == [4, 4]
