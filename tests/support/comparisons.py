"""A composition of settings, trained with a mesh and without one, for comparison.

`compare(draw)` trains it for STEPS updates twice: on one device without a mesh, plainly, and in the
way that was drawn.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from compositions import STEPS, Draw, Masks, make_plain
from jax.sharding import NamedSharding
from meshes import remember

from gpt_jax import config
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.model.transformer import abstract_params
from gpt_jax.run.parts import make_network
from gpt_jax.sharding import layout, rows
from gpt_jax.sharding.mesh import join_path, make_mesh
from gpt_jax.train.optim.optimizer import make_optimizer, make_zero1
from gpt_jax.train.step import init_state, train_step


class Differences(NamedTuple):
    """How far the two runs are apart.

    `metrics` has parts of a value, the largest of all steps. `gradients` has those of the first
    step by path, as parts of the leaf's largest entry. `updates` has by path the part of a leaf's
    entries whose change over all steps differs by more than 1e-3 of the largest change.
    """

    metrics: dict[str, float]
    gradients: dict[str, float]
    updates: dict[str, float]
    losses: tuple[float, ...]


def _cut_documents(masks: Masks, length: int, rng) -> list[int]:
    """Lengths of a row's documents; the last is padding where `masks` says so."""
    if masks.documents == "plain":
        return [length]
    if masks.documents == "two":
        return [length // 2 - 1, length - length // 2 + 1]
    cuts = np.sort(rng.choice(np.arange(1, length), size=3, replace=False))
    return np.diff([0, *cuts, length]).tolist()


def make_columns(settings: config.Config, masks: Masks) -> dict[str, np.ndarray]:
    """A batch in numpy: the same for both runs."""
    train = settings.train
    count, length, vocab = train.batch_size, train.seq_len, settings.model.vocab
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab, (count, length + 1))
    weight = np.ones((count, length), np.float32)
    if masks.targets != "all":
        weight = (rng.random(weight.shape) < rng.random((count, 1))).astype(np.float32)
    if masks.targets == "few":
        weight[rng.random(count) < 0.5] = 0
        weight[0, 0] = 1

    segment = np.zeros((count, length), np.int32)
    position = np.zeros((count, length), np.int32)
    ar = np.ones((count, length), np.int32)
    for row in range(count):
        sizes = _cut_documents(masks, length, rng)
        segment[row] = np.repeat(np.arange(len(sizes)) + 1, sizes)
        position[row] = np.concatenate([np.arange(size) for size in sizes])
        prefix = rng.integers(1, 5, len(sizes)).repeat(sizes)
        ar[row] = (position[row] == 0) | (position[row] >= prefix)
        if masks.documents == "padded":
            padding = segment[row] == len(sizes)
            segment[row, padding] = 0
            weight[row, padding] = 0

    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight}
    columns["bytes"] = rng.integers(1, 5, (count, length))
    if masks.documents != "plain":
        columns |= {"segment": segment, "position": position}
    if masks.prefix:
        columns["ar"] = ar
    return columns


def make_params(model: config.Model):
    """Normal draws in numpy, so that no zeros hide a wrong sum."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), abstract_params(model)
    )


class Run(NamedTuple):
    """What a training gave, in numpy."""

    metrics: list[dict[str, np.ndarray]]  # a step each, divided
    gradients: dict[str, np.ndarray]  # of the first step
    changes: dict[str, np.ndarray]  # of parameters and averages over all steps


def _by_path(tree) -> dict[str, np.ndarray]:
    return {join_path(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def train(settings: config.Config, masks: Masks) -> Run:
    """Trains on the current mesh, or without one."""
    model = settings.model
    like = abstract_params(model)
    start = make_params(model)
    params, columns = start, make_columns(settings, masks)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        params = jax.tree.map(
            lambda x, y: jax.device_put(x, NamedSharding(mesh, y.sharding.spec)), start, like
        )
        columns = rows.to_devices(mesh, columns, settings.train.batch_size)

    rule = make_optimizer(settings.optim, like, describe_parameter, balance_rate=model.balance_rate)
    tx = optax.chain(remember(), rule)
    if settings.mesh.zero == 1:
        tx = make_zero1(tx, partial(layout.lay_out_like, like=like), layout.gather_fsdp)
        params = layout.gather_fsdp(params)
    network = make_network(model, settings.compute)
    state = jax.jit(lambda params: init_state(params, tx, settings.train))(params)
    step = jax.jit(partial(train_step, network=network, tx=tx, train=settings.train))

    metrics, gradients, key = [], {}, jax.random.key(3)
    for _ in range(STEPS):
        state, sums = step(state, {}, columns, key)
        metrics.append({name: np.asarray(a) / float(b) for name, (a, b) in sums.items()})
        gradients = gradients or _by_path(state.opt[0])

    before = _by_path(start)
    changes = {path: x - before[path] for path, x in _by_path(state.params).items()}
    if state.ema:
        changes |= {f"ema/{path}": x - before[path] for path, x in _by_path(state.ema).items()}
    return Run(metrics, gradients, changes)


@lru_cache(maxsize=4)
def train_alone(plain: config.Config, masks: Masks) -> Run:
    """Trains on one device without a mesh."""
    with jax.default_device(jax.devices()[0]):
        return train(plain, masks)


def train_on_mesh(drawn: Draw) -> Run:
    """Trains on the mesh of the draw."""
    mesh = drawn.settings.mesh
    count = config.least_devices(mesh)
    shape = config.mesh_shape(mesh, count)
    devices = jax.devices()[:count]
    with jax.set_mesh(make_mesh(shape, devices, across=config.cross_slice(mesh))):
        return train(drawn.settings, drawn.masks)


def _largest(x) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def measure(ours: Run, theirs: Run) -> Differences:
    """How far `ours` is from `theirs`."""
    metrics: dict[str, float] = {}
    for now, plain in zip(ours.metrics, theirs.metrics, strict=True):
        for name, value in now.items():
            # Shares and losses near 0 are measured against 1 %.
            apart = _largest(value - plain[name]) / max(_largest(plain[name]), 1e-2)
            metrics[name] = float(np.max([apart, metrics.get(name, 0.0)]))  # keeps a NaN

    # The gradient of key biases is zero but for rounding.
    largest = max(map(_largest, theirs.gradients.values()))
    gradients = {
        path: _largest(ours.gradients[path] - plain) / max(_largest(plain), 1e-2 * largest)
        for path, plain in theirs.gradients.items()
    }

    updates = {}
    for path, plain in theirs.changes.items():
        # Some optimisers make steps of rounding alone, of whole leaves or of single entries.
        gradient = np.abs(theirs.gradients[path.removeprefix("ema/")])
        if gradient.max() > 1e-3 * largest:
            same = np.abs(ours.changes[path] - plain) <= 1e-3 * _largest(plain) + SPACING
            updates[path] = float(np.mean(~same & (gradient > ROUNDING * gradient.max())))
    losses = tuple(float(now["loss"]) for now in theirs.metrics)
    return Differences(metrics, gradients, updates, losses)


def compare(drawn: Draw) -> Differences:
    """Trains the draw in both ways."""
    alone = train_alone(make_plain(drawn.settings), drawn.masks)
    return measure(train_on_mesh(drawn), alone)


# Parameters are below 1, and each step rounds them once.
SPACING = STEPS * 2.0**-24
# A gradient that is this part of its leaf's largest is rounding.
ROUNDING = 1e-6
# Of 142 compositions the largest were 6.9e-6 (a balance loss), 5.9e-5 (a learned scalar, whose
# gradient is a sum over all tokens) and 4.3e-4 (benchmarks/compositions.json). A leaf can be small,
# and one entry of it can turn where an optimiser takes signs.
METRICS = 2e-5
GRADIENTS = 2e-4
UPDATES = 0.02


def find_faults(apart: Differences) -> list[str]:
    """A line for each difference beyond rounding; a NaN is one."""
    lines = []
    for kind, limit in (("metrics", METRICS), ("gradients", GRADIENTS), ("updates", UPDATES)):
        parts = getattr(apart, kind)
        lines += [f"{kind} of {name}: {x:.1e}" for name, x in parts.items() if not x <= limit]
    return lines
