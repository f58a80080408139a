"""The check that any mesh computes what one device does: the loss and every gradient.

The reference runs on one device, in one microbatch, with all logits at once and without remat.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from gpt_jax import config as configs, run, sharding
from gpt_jax.card.finding import CannotCheckError, Result, find_worst
from gpt_jax.card.shrink import ROWS
from gpt_jax.card.subject import Subject, load_weights, take_batch
from gpt_jax.model import abstract_params, choose_kernel, make_problem
from gpt_jax.train import gradients

DEVICES = 8
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context 2, fsdp 4": {"context": 2, "fsdp": 4},
    "pipeline 2, fsdp 4": {"pipeline": 2, "fsdp": 4},
    "expert 4, fsdp 2": {"expert": 4, "fsdp": 2},
}
# Of gradients, as a part of the leaf's largest entry. Float32 sums in another order were seen to
# differ by 5e-5 at most in the project's own tests of meshes.
TOLERANCE = 1e-4
# A leaf whose largest entry is a smaller part of the largest of all counts as that part. Without it
# the rounding noise of a gradient that is zero would count as an error.
FLOOR = 1e-3


def list_meshes(subject: Subject) -> tuple[dict[str, dict[str, int]], list[str]]:
    """(shape by name of the meshes that the row can run on, why it cannot run on the others).

    The row's own shape decides, and then the tiny one. A mesh of experts is for rows with experts.
    """
    taken = {}
    refused = []
    for name, axes in MESHES.items():
        if "expert" in axes and not configs.has_experts(subject.config.model):
            continue
        shape = {axis: axes.get(axis, 1) for axis in configs.AXES}
        fault = find_fault(subject, shape)
        if fault:
            refused.append(f"{name}: {fault}")
        else:
            taken[name] = shape
    return taken, refused


def find_fault(subject: Subject, shape: dict[str, int]) -> str:
    """Why a mesh is refused, in a few words, or ""."""
    if jax.device_count() < DEVICES:
        return f"needs {DEVICES} devices and has {jax.device_count()} (--cpu_devices={DEVICES})"
    row = subject.row
    if not row.model.vocab:
        row = replace(row, model=replace(row.model, vocab=subject.config.model.vocab))
    # Batches are for the machine to choose, and a shape is not.
    rows = replace(row.train, batch_size=ROWS, accumulate=1, batch_ramp=())
    row = replace(row, train=rows, eval=replace(row.eval, batch_size=ROWS))

    for config in (row, subject.config):
        mesh = configs.Mesh(**shape, zero=config.mesh.zero)
        faults = configs.problems(replace(config, mesh=mesh), shape)
        if faults:
            return faults[0].partition("; ")[0]
    return ""


def make_mesh_config(subject: Subject, shape: dict[str, int]) -> configs.Config:
    """The subject's config on a mesh, with a kernel that can run there."""
    config = subject.config
    compute = replace(config.compute, kernel=choose(config, shape["context"]))
    return replace(config, compute=compute, mesh=configs.Mesh(**shape, zero=config.mesh.zero))


def choose(config: configs.Config, context: int) -> str:
    """The attention kernel on this machine for rows that are cut into so many parts."""
    problem = make_problem(
        config.model,
        config.compute.dtype,
        config.train.seq_len,
        jax.default_backend(),
        context=context,
        packed=config.data.document_mask,
    )
    return choose_kernel("auto", problem)[0]


def check_meshes(subject: Subject) -> Result:
    """The loss and the gradients of one batch are those of one device."""
    meshes, refused = list_meshes(subject)
    if not meshes:
        raise CannotCheckError("; ".join(refused))

    params = jax.tree.map(np.asarray, load_weights(subject))
    batch = take_batch(subject)
    one: dict[str, int] = dict.fromkeys(configs.AXES, 1)
    alone = compute_gradients(make_plain(subject.config), one, params, batch)

    errors = {}
    for name, shape in meshes.items():
        config = make_mesh_config(subject, shape)
        errors[name] = compare(alone, compute_gradients(config, shape, params, batch))
    worst = max(errors, key=lambda name: errors[name])
    figure = f"{len(errors)} meshes, largest difference {errors[worst]:.1e} ({worst})"
    if refused:
        figure += "; refused: " + "; ".join(refused)
    return Result(errors[worst] <= TOLERANCE, figure)


def make_plain(config: configs.Config) -> configs.Config:
    """The reference's config: nothing is cut, kept out of memory or computed again."""
    train = replace(config.train, accumulate=1, loss_chunk=0)
    compute = configs.set_remat(replace(config.compute, kernel="reference", unroll=1), "none")
    return replace(config, train=train, compute=compute)


def compute_gradients(
    config: configs.Config, shape: dict[str, int], params: Any, batch: dict[str, np.ndarray]
) -> tuple[float, dict[str, np.ndarray]]:
    """(the objective, its gradient by path) of numpy parameters and columns on a mesh."""
    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    network = run.make_network(config.model, config.compute)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        like = sharding.make_concrete(abstract_params(config.model), mesh)
        placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, like)
        columns = sharding.to_devices(mesh, batch, config.train.batch_size)

        def measure(params, columns):
            return gradients(network, params, {}, columns, key, config.train)

        grads, sums = jax.device_get(jax.jit(measure)(placed, columns))
    total, weight = sums["objective"]
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    by_path = {sharding.join_path(path): np.asarray(leaf) for path, leaf in leaves}
    return float(total) / float(weight), by_path


def compare(alone: tuple[float, dict], other: tuple[float, dict]) -> float:
    """The largest difference: of the loss as a part of it, and of each gradient's entries."""
    loss, grads = alone
    other_loss, other_grads = other
    return find_worst([abs(other_loss - loss) / abs(loss), compare_gradients(grads, other_grads)])


def compare_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference, as a part of the largest entry of each of `ours`."""
    largest = find_worst(float(np.abs(leaf).max()) for leaf in ours.values())
    errors = []
    for path, leaf in ours.items():
        size = max(float(np.abs(leaf).max()), FLOOR * largest)
        errors.append(float(np.abs(theirs[path] - leaf).max()) / size)
    return find_worst(errors)
