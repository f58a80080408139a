"""A trained model from a checkpoint path alone: config, tokenizer and weights on the devices there are (floor 3; called by
the commands that take a checkpoint)."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax

from gpt_jax import config as configs
from gpt_jax import sharding
from gpt_jax.data.tokenizer import Tokenizer, from_json
from gpt_jax.model import kernels
from gpt_jax.model.transformer import abstract_params
from gpt_jax.train import checkpoint


class Loaded(NamedTuple):
    """`config.model.kernel` is concrete for this machine; `params` lie on `mesh`."""

    config: configs.Config
    tokenizer: Tokenizer
    params: Any
    mesh: jax.sharding.Mesh
    directory: Path
    step: int
    content: str  # digest of the text it was trained on, see data/cache.py


def pick_mesh(model: configs.Model, devices: int) -> jax.sharding.Mesh:
    """All devices along fsdp, which needs least memory, or along data where the width does not divide."""
    return sharding.make_mesh({"fsdp" if model.embed % devices == 0 else "data": devices})


def load(path: str, step: int, say: Callable[[str], None], devices: int = 0) -> Loaded:
    """The newest valid checkpoint at `path` (or its `step`), on `devices` devices of this job (0: all).

    Averaged weights are taken where the run kept them. Raises UsageError for a path or step that is not there,
    NoCheckpoint for damage."""
    directory, step = checkpoint.resolve_checkpoint(path, step, say)
    meta = checkpoint.read_meta(directory, step)
    config = configs.from_dict(meta["config"])
    count = devices or jax.device_count()
    kernel, _ = kernels.choose("auto", kernels.problem(config.model, config.train.seq_len, jax.default_backend()))
    model = replace(config.model, kernel=kernel, remat="none")
    mesh = pick_mesh(model, count) if count > 1 else sharding.make_mesh({}, jax.local_devices()[:1])
    item = "ema" if config.train.ema else "params"
    with jax.set_mesh(mesh):
        abstract = sharding.concrete(abstract_params(model), mesh)
        params = checkpoint.restore(directory, step, {item: abstract})[item]
    say(f"step {step} of {directory}, {'averaged weights, ' if config.train.ema else ''}on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}")
    return Loaded(replace(config, model=model), from_json(meta["tokenizer"]), params, mesh, directory, step,
                  meta["data"]["content"])
