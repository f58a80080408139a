"""A trained model from a checkpoint path alone: config, tokenizer, and weights on the devices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.cluster import agree_on
from gpt_jax.data import is_remote
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.hardware import check_miscompiles
from gpt_jax.interop import is_foreign, load_params, open_foreign
from gpt_jax.model import abstract_params
from gpt_jax.run.adapters import choose_base, restore_merged
from gpt_jax.run.agreement import choose_run_kernel
from gpt_jax.run.convert import check_vocabulary, make_config
from gpt_jax.run.fetch import MIRROR, find_checkpoint
from gpt_jax.run.finite import find_nonfinite
from gpt_jax.run.loaded import Loaded
from gpt_jax.run.meta import (
    META_SCHEMA,
    read_config,
    read_past_sizes,
    read_tasks,
    read_tokenizer,
)
from gpt_jax.run.notes import describe_habits, format_count
from gpt_jax.run.source import open_source
from gpt_jax.train import MANIFEST, read_meta, resolve_checkpoint, restore_checkpoint


def pick_mesh(model: configs.Model, devices: int, is_decoding: bool) -> jax.sharding.Mesh:
    """A mesh of so many devices, over which the weights are split.

    Whole rows are split along fsdp, and weights are gathered for them. One token a row is too
    little work for that. So where tokens are drawn, as many devices as the widths allow lie along
    tensor, and weights stay where they are.

    What is left lies along data if a width of the model does not divide by it.
    """
    tensor = configs.widest_tensor(model, devices) if is_decoding else 1
    rest = devices // tensor
    widths = [model.embed]
    if model.value_embed:
        widths.append(model.kv_heads * model.head_dim)
    axis = "data" if any(width % rest for width in widths) else "fsdp"
    return sharding.make_mesh({axis: rest, "tensor": tensor}, jax.devices()[:devices])


# A run may delete the newest checkpoint while it is read. Then the next newest one is tried.
ATTEMPTS = 3


def load_model(
    path: str,
    step: int,
    say: Callable[[str], None],
    devices: int = 0,
    ignore_miscompiles: bool = False,
    is_decoding: bool = False,
    mirror: str = MIRROR,
    base: str = "",
) -> Loaded:
    """The newest valid checkpoint at `path`, or its `step`, on devices of this job.

    A directory of Hugging Face is read without conversion. A checkpoint at a URL is copied below
    `mirror`, see `find_checkpoint`.

    `devices` is their number, where 0 means all. `is_decoding` lays the weights out for drawing
    tokens, see `pick_mesh`. Averaged weights are taken if the run kept them. `base` is where the
    weights beneath adapters are now, if they have moved.

    Raises UsageError for a path or step that does not exist, and NoCheckpoint for damage. Raises
    Miscompiled if the compiler is known to give wrong results, unless `ignore_miscompiles`.
    """
    for line in check_miscompiles(jax.local_devices()[0], ignore_miscompiles):
        say(line)
    if is_foreign(path):
        if step:
            raise UsageError(f"--step={step}: {path} has no steps; leave it out")
        choose_base({}, base, path)
        return _load_foreign(path, say, devices, is_decoding)

    if is_remote(path):
        directory, number = find_checkpoint(path, step, say, mirror)
        return _load(directory, number, say, devices, is_decoding, base)

    # Several processes would have to agree on another attempt in the middle of a collective read.
    attempts = 1 if step or jax.process_count() > 1 else ATTEMPTS
    for _ in range(attempts - 1):
        directory, newest = resolve_checkpoint(path, step, say, META_SCHEMA)
        try:
            return _load(directory, newest, say, devices, is_decoding, base)
        except (NoCheckpoint, UsageError):
            if (directory / str(newest) / MANIFEST).exists():
                raise
        say(
            f"step {newest} of {directory} was deleted by its run meanwhile; "
            "taking the newest again"
        )
    directory, number = resolve_checkpoint(path, step, say, META_SCHEMA)
    return _load(directory, number, say, devices, is_decoding, base)


def load_step(
    directory: Path, step: int, say: Callable[[str], None], base: str = ""
) -> Loaded | None:
    """One step of a folder of checkpoints, verified, on all devices of this job.

    Weights alone are read, as in `load_model`. It gives None if the run has deleted the step. On
    several processes a step that is deleted while it is read ends in an error, because they would
    have to agree in the middle of a collective read. Raises NoCheckpoint for damage, and UsageError
    for a config that this version cannot use.
    """
    manifest = directory / str(step) / MANIFEST

    def is_deleted() -> bool:
        return agree_on(lambda: not manifest.exists())

    try:
        resolve_checkpoint(str(directory), step, say, META_SCHEMA)
    except (NoCheckpoint, UsageError):
        if is_deleted():
            return None
        raise
    try:
        return _load(directory, step, say, 0, False, base)
    except (NoCheckpoint, UsageError):
        if jax.process_count() == 1 and is_deleted():
            return None
        raise


def _load(
    directory: Path,
    step: int,
    say: Callable[[str], None],
    devices: int,
    is_decoding: bool,
    base: str,
) -> Loaded:
    """Reads one step. Raises UsageError and NoCheckpoint."""
    meta = read_meta(directory, step, META_SCHEMA)
    config = read_config(meta, directory, step)
    tokenizer = read_tokenizer(meta, directory, step)
    for line in configs.describe_inference(config.compute):
        say(line)
    settled, mesh, kernel = _settle(config, devices, is_decoding)

    item = "ema" if config.train.ema else "params"
    with jax.set_mesh(mesh):
        abstract = sharding.make_concrete(abstract_params(settled.model), mesh)
        beneath = choose_base(meta, base, f"step {step} of {directory}")
        if beneath is not None:
            about = beneath, config.lora, directory, step
            params = restore_merged(open_source, *about, item, abstract, say)
            # From here on it is a model like any other.
            settled = replace(settled, lora=configs.Lora())
        else:
            params = restore_checkpoint(directory, step, {item: abstract})[item]

    weights = ", averaged weights" if config.train.ema else ""
    _tell(f"step {step} of {directory}{weights}", settled, mesh, kernel, params, say)
    return Loaded(
        settled,
        tokenizer,
        params,
        mesh,
        directory,
        step,
        meta["data"]["content"],
        read_past_sizes(meta, config, directory).examples(step),
        read_tasks(meta),
    )


def _load_foreign(path: str, say: Callable[[str], None], devices: int, is_decoding: bool) -> Loaded:
    """Reads a directory of another project, each device its own parts. Raises UsageError."""
    origin = open_foreign(path)
    line = check_vocabulary(
        origin.model,
        origin.tokenizer,
        f"gpt-jax convert --from {path} --to DIR --tokenizer=SPEC, and use DIR",
    )
    if line:
        say(line)
    settled, mesh, kernel = _settle(
        make_config(origin.model, origin.tokenizer), devices, is_decoding
    )

    with jax.set_mesh(mesh):
        abstract = sharding.make_concrete(abstract_params(settled.model), mesh)
        params = load_params(origin.read, abstract)
    _tell(f"{origin.name}, a {origin.family}", settled, mesh, kernel, params, say)
    assert origin.tokenizer is not None
    return Loaded(settled, origin.tokenizer, params, mesh, Path(path), 0, "", 0)


def _settle(
    config: configs.Config, devices: int, is_decoding: bool
) -> tuple[configs.Config, jax.sharding.Mesh, str]:
    """The config for inference on so many devices, their mesh, and a line about the kernel."""
    model, compute = configs.for_inference(config.model, config.compute)
    count = devices or jax.device_count()
    alone = sharding.make_mesh({}, jax.local_devices()[:1])
    mesh = pick_mesh(model, count, is_decoding) if count > 1 else alone

    # The kernel of the run was chosen for that machine and for dropout, so another is chosen here.
    # This machine need not have the run's matmul of experts either, nor cut the embedding.
    asked = replace(compute, kernel="auto", expert_matmul="auto", embed_lookup="auto")
    packed = config.data.document_mask
    name, reason = choose_run_kernel(model, asked, config.train.seq_len, packed, mesh)
    settled = replace(config, model=model, compute=replace(asked, kernel=name))
    return settled, mesh, f"{name} ({reason})"


def _tell(what: str, settled: configs.Config, mesh, kernel: str, params, say) -> None:
    """Says in a line what was loaded, on which devices, and in another what is wrong with it."""
    devices = format_count(mesh.size, f"{mesh.devices.flat[0].device_kind} device")
    say(f"{what}, on {devices}; attention kernel: {kernel}; {describe_habits(settled, mesh)}")
    with jax.set_mesh(mesh):
        nonfinite = find_nonfinite(params)
    if nonfinite:
        say(f"{nonfinite} of {what}; nothing that such a model gives can be trusted")
