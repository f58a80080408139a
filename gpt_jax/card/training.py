"""Checks of a run: it trains, it resumes to the bit, and its state moves to other meshes."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax import run, sharding, train
from gpt_jax.card.finding import CannotCheckError, Result
from gpt_jax.card.meshes import list_meshes, make_mesh_config
from gpt_jax.card.subject import Subject, find_step
from gpt_jax.metrics import read_jsonl


def check_training(subject: Subject) -> Result:
    """The loss falls over the run."""
    run.run_training(subject.parts, subject.workdir, None, subject.say)
    losses = read_losses(subject.workdir)
    steps = subject.config.train.steps
    first = losses[1]
    last = losses[steps]
    holds = math.isfinite(last) and last < first
    return Result(holds, f"loss {first:.4f} at step 1, {last:.4f} at step {steps}")


def read_losses(workdir: Path) -> dict[int, float]:
    """The training loss by step."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def check_resume(subject: Subject) -> Result:
    """A run that was cut at half its steps ends like the one that was not."""
    last = find_step(subject)
    half = last // 2
    again = subject.folder / "resumed"
    place = Path(train.CHECKPOINT_FOLDER) / str(half)
    shutil.copytree(subject.workdir / place, again / place)
    run.run_training(subject.parts, again, None, subject.say)

    before = read_losses(subject.workdir)
    after = read_losses(again)
    others = [step for step in range(half + 1, last + 1) if before[step] != after.get(step)]
    folders = (subject.checkpoints, again / train.CHECKPOINT_FOLDER)
    whole, resumed = (read_state(folder, last, subject.parts.abstract) for folder in folders)
    differing = count_differing(whole, resumed)
    return Result(
        not others and not differing,
        f"{last - half - len(others)} of {last - half} losses and {len(whole) - differing} of "
        f"{len(whole)} arrays equal to the bit",
    )


def read_state(folder: Path, step: int, abstract: train.TrainState) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path, laid out like `abstract` while it is read."""
    items: dict[str, Any] = {
        "params": abstract.params,
        "train": abstract._replace(params={}, ema={}),
    }
    if abstract.ema:
        items["ema"] = abstract.ema
    loaded = train.restore_checkpoint(folder, step, items)
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def count_differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    """The arrays that are not the same to the bit, or that only one side has."""
    same = [path for path in a.keys() & b.keys() if a[path].tobytes() == b[path].tobytes()]
    return len(a.keys() | b.keys()) - len(same)


def check_reshard(subject: Subject) -> Result:
    """A checkpoint of one device is restored on each mesh with the same bits."""
    step = find_step(subject)
    whole = read_state(subject.checkpoints, step, subject.parts.abstract)
    meshes, refused = list_meshes(subject)
    if not meshes:
        raise CannotCheckError("; ".join(refused))

    differing = {}
    for name, shape in meshes.items():
        config = make_mesh_config(subject, shape)
        mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape.values())])
        abstract = run.make_steps(config, mesh).abstract
        with jax.set_mesh(mesh):
            count = count_differing(whole, read_state(subject.checkpoints, step, abstract))
        if count:
            differing[name] = count

    figure = f"{len(whole)} arrays equal to the bit on {len(meshes)} meshes"
    if differing:
        figure = f"arrays that differ: {differing}"
    return Result(not differing, figure)
