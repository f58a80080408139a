"""Moments in the memory of the host: the same steps, whatever the optimiser and the mesh."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

from gpt_jax import config, sharding, train
from gpt_jax.run.parts import make_steps
from gpt_jax.train.optim.streaming import split

STEPS = 3
OPTIMIZERS = {
    "adamw": config.Optim(optimizer="adamw"),
    "adafactor": config.Optim(optimizer="adafactor"),
    "muon": config.Optim(
        groups=(config.Group(match="blocks/.*kernel", optimizer="muon"),), clip=0.5
    ),
}


@cache
def make_run(memory: str, optimizer: str, fsdp: int, zero: int):
    """(functions of a run, its mesh) of a tiny model with experts."""
    settings = meshes.make_config("moe")
    optim = replace(OPTIMIZERS[optimizer], state_memory=memory)
    mesh = sharding.make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
    settings = replace(
        settings, optim=optim, mesh=config.Mesh(data=1, fsdp=fsdp, zero=zero)
    )
    return make_steps(config.resolve(settings), mesh), mesh


def make_batch(mesh) -> dict:
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    columns = meshes.make_columns("moe")
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


@pytest.mark.parametrize(
    "job",
    [
        ("adamw", 1, 3),
        ("adamw", 4, 3),
        ("adamw", 4, 1),
        ("adafactor", 4, 3),
        ("muon", 4, 3),
    ],
)
def test_where_moments_lie_changes_nothing(job):
    """The state keeps its memory through donated steps, and is described as it is."""
    plain, plain_losses = take_steps("device", *job)
    state, losses = take_steps("host", *job)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(state), jax.tree.leaves(plain), strict=True
    ):
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
