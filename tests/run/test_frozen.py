"""A frozen model in the compiled steps: an argument, sharded, kept, and in no checkpoint."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from gpt_jax import config as configs, sharding
from gpt_jax.run import loop
from gpt_jax.run.parts import make_steps
from gpt_jax.train import (
    OBJECTIVES,
    Readout,
    next_token,
    resolve_checkpoint,
    restore_checkpoint,
    sum_logits,
)

VOCAB, ROWS, LENGTH = 24, 8, 16
FROZEN_SEED = 7


def sum_distance(logits, reference, columns):
    weight = columns["weight"]
    distance = jnp.square(jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference)).mean(-1)
    return {"distance": ((distance * weight).sum(), weight.sum())}


def stay_near(network, params, frozen, batch, key, train):
    """The next token's loss and the distance from the frozen model, summed."""
    sums = next_token(network, params, {}, batch, key, train)
    hidden, _ = network.features(params, batch, None)
    reference, _ = network.features(frozen, batch, None)
    readouts = Readout(network, params, hidden), Readout(network, frozen, reference)
    weights = {"weight": batch["weight"]}
    near = sum_logits(sum_distance, weights, train.loss_chunk, *readouts, learned="distance")
    total, weight = sums["objective"]
    return sums | near | {"objective": (total + near["distance"][0], weight)}


@pytest.fixture(autouse=True)
def staying(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "stay_near", stay_near)


def make_config(**train) -> configs.Config:
    config = configs.Config(
        model=configs.Model(layers=2, embed=32, heads=4, position="rotary"),
        compute=configs.Compute(kernel="reference"),
        optim=configs.Optim(learning_rate=1e-2),
        train=configs.Train(steps=3, batch_size=ROWS, seq_len=LENGTH, **train),
    )
    config = configs.resolve(config, VOCAB)
    return replace(config, train=replace(config.train, objective="stay_near"))


def make_batch(mesh):
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1))
    columns = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weight": np.ones((ROWS, LENGTH), np.float32),
        "bytes": np.ones((ROWS, LENGTH), np.int32),
    }
    return sharding.to_devices(mesh, columns, ROWS)


def measure(mesh, **train):
    """(steps, first state's parameters, Sums of three updates) with another model frozen."""
    config = make_config(**train)
    with jax.set_mesh(mesh):
        other = make_steps(replace(config, seed=FROZEN_SEED), mesh)
        steps = make_steps(config, mesh)
        frozen = other.make_state().params
        state = steps.make_state()
        kept = jax.tree.map(np.asarray, frozen)
        found = []
        for _ in range(3):
            state, sums = steps.train_step(state, make_batch(mesh), frozen)
            found.append({name: float(a) / float(b) for name, (a, b) in sums.items()})
        jax.tree.map(np.testing.assert_array_equal, kept, frozen)
    return steps, state, frozen, found


def test_one_device_and_a_split_model_agree(mesh):
    _, _, _, alone = measure(mesh(1))
    steps, _, frozen, split = measure(mesh(2, 2, 2), loss_chunk=8, accumulate=2)
    assert alone[0]["distance"] > 0.01
    for ours, theirs in zip(split, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)

    # Frozen weights are stored like those that are learned, and not on every device whole.
    layouts = jax.tree.map(lambda x: x.sharding.spec, frozen)
    assert layouts == jax.tree.map(lambda x: x.sharding.spec, steps.abstract.params)


def test_frozen_is_an_argument_of_the_program(mesh):
    """Not a constant: the program has its arrays as inputs, and gives none of them back."""
    one = mesh(1)
    steps, state, frozen, _ = measure(one)
    with jax.set_mesh(one):
        batch = make_batch(one)
        lowered = steps.train_step.lower(state, batch, frozen)
        evaluated = steps.eval_step(state.params, batch, frozen)
    assert "distance" in evaluated

    inputs = jax.tree.leaves(lowered.args_info)
    assert len(inputs) == len(jax.tree.leaves((state, batch, frozen)))
    assert sum(x.donated for x in inputs) == len(jax.tree.leaves(state))
    result, _ = lowered.out_info
    assert jax.tree.structure(result) == jax.tree.structure(state)


def test_the_loop_trains_evaluates_and_saves_without_it(tmp_path):
    """Checkpoints of a run with a frozen model hold what those of any run hold."""
    sizes = ("--config.train.steps=4", "--config.eval.every_steps=2", "--config.eval.batches=1")
    parts = runs.build(runs.load(tmp_path, *sizes), data=1, fsdp=2)
    runs.run(parts, tmp_path / "plain")

    # The frozen model is a checkpoint, read onto the mesh of the run.
    directory, step = resolve_checkpoint(str(tmp_path / "plain"), 0, lambda line: None)
    like = parts.abstract.params
    with jax.set_mesh(parts.mesh):
        frozen = restore_checkpoint(directory, step, {"params": like})["params"]
    assert jax.tree.map(lambda x: x.sharding, frozen) == jax.tree.map(lambda x: x.sharding, like)
    config = replace(parts.config, train=replace(parts.config.train, objective="stay_near"))
    steps = make_steps(config, parts.mesh)
    near = parts._replace(train_step=steps.train_step, eval_step=steps.eval_step, frozen=frozen)

    runs.run(near, tmp_path / "near")

    def files(run):
        folder = tmp_path / run / loop.CHECKPOINT_FOLDER / "4"
        names = json.loads((folder / "params" / "_METADATA").read_text())["tree_metadata"]
        return sorted(names), sorted(x.name for x in folder.iterdir())

    assert files("near") == files("plain")
    assert runs.curve(tmp_path / "near", "eval/loss") != runs.curve(tmp_path / "plain", "eval/loss")
    assert min(runs.curve(tmp_path / "near", "train/distance").values()) > 0
    assert runs.curve(tmp_path / "near", "eval/distance").keys() == {2, 4}
