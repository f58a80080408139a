"""A trained model from a checkpoint path alone: config, tokenizer, and weights on the devices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.data import Tokenizer, tokenizer_from_json
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.hardware import check_miscompiles
from gpt_jax.model import abstract_params, choose_kernel, make_problem
from gpt_jax.run.notes import describe_habits, format_count
from gpt_jax.run.resume import read_saved_config
from gpt_jax.train import MANIFEST, read_meta, resolve_checkpoint, restore_checkpoint


class Loaded(NamedTuple):
    """A trained model. Its attention kernel was chosen for this machine. `params` lie on `mesh`."""

    config: configs.Config
    tokenizer: Tokenizer
    params: Any
    mesh: jax.sharding.Mesh
    directory: Path
    step: int
    content: str  # digest of the text it was trained on, see data/cache.py


def pick_mesh(model: configs.Model, devices: int) -> jax.sharding.Mesh:
    """A mesh of so many devices along fsdp, which needs least memory.

    They lie along data instead if a width of the model does not divide by their number.
    """
    widths = [model.embed] + [model.kv_heads * model.head_dim] * model.value_embed
    axis = "data" if any(width % devices for width in widths) else "fsdp"
    return sharding.make_mesh({axis: devices}, jax.devices()[:devices])


ATTEMPTS = 3


def load_model(
    path: str,
    step: int,
    say: Callable[[str], None],
    devices: int = 0,
    ignore_miscompiles: bool = False,
) -> Loaded:
    """The newest valid checkpoint at `path` (or its `step`), on `devices` devices of this job (0:
    all).

    Averaged weights are taken where the run kept them. Raises UsageError for a path or step that
    is not there, NoCheckpoint for damage, and Miscompiled where the compiler is known to give wrong
    results, unless `ignore_miscompiles`."""
    for line in check_miscompiles(jax.local_devices()[0], ignore_miscompiles):
        say(line)
    for attempts in range(ATTEMPTS, 0, -1):
        directory, found = resolve_checkpoint(path, step, say)
        try:
            return _load(directory, found, say, devices)
        except (NoCheckpoint, UsageError):
            # Several processes would have to agree on it in the middle of a collective read.
            if (
                jax.process_count() > 1
                or step
                or attempts == 1
                or (directory / str(found) / MANIFEST).exists()
            ):
                raise
            say(
                f"step {found} of {directory} was deleted by its run meanwhile; taking the newest "
                "again"
            )


def _load(directory: Path, step: int, say: Callable[[str], None], devices: int) -> Loaded:
    meta = read_meta(directory, step)
    config = read_saved_config(meta)
    count = devices or jax.device_count()
    # Not the kernel of the run, which was chosen for the machine and the dropout of training.
    model = replace(config.model, dropout=0.0, attention_dropout=0.0)
    name, reason = choose_kernel(
        "auto",
        make_problem(model, config.compute.dtype, config.train.seq_len, jax.default_backend()),
    )
    compute = replace(config.compute, kernel=name, remat="none")
    mesh = pick_mesh(model, count) if count > 1 else sharding.make_mesh({}, jax.local_devices()[:1])
    item = "ema" if config.train.ema else "params"
    with jax.set_mesh(mesh):
        abstract = sharding.make_concrete(abstract_params(model), mesh)
        params = restore_checkpoint(directory, step, {item: abstract})[item]
    settled = replace(config, model=model, compute=compute)
    weights = "averaged weights, " if config.train.ema else ""
    devices_text = format_count(mesh.size, f"{mesh.devices.flat[0].device_kind} device")
    say(
        f"step {step} of {directory}, {weights}on {devices_text}; attention kernel: "
        f"{name} ({reason}); {describe_habits(settled, mesh)}"
    )
    return Loaded(
        settled,
        tokenizer_from_json(meta["tokenizer"]),
        params,
        mesh,
        directory,
        step,
        meta["data"]["content"],
    )
