"""Between checkpoints of ours and the models of other projects, a slice at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import config as configs
from gpt_jax.data import Tokenizer, begins_documents, is_remote
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.interop import (
    Origin,
    describe_nonfinite,
    find_depths,
    find_meaning,
    is_foreign,
    list_shapes,
    open_foreign,
    refuse_nonfinite,
    watch,
    write_config,
    write_directory,
    write_peft,
)
from gpt_jax.run.adapters import (
    check_fingerprint,
    choose_base,
    explain_base,
    fingerprint_slices,
    read_adapters,
    read_merged,
)
from gpt_jax.run.fetch import MIRROR, find_checkpoint, split_step
from gpt_jax.run.lineage import digest_files, make_foreign_entry, make_run_entry
from gpt_jax.run.meta import META_SCHEMA, count_tokens, read_config, read_tasks, read_tokenizer
from gpt_jax.train import (
    CHECKPOINT_FOLDER,
    MANIFEST,
    Lazy,
    read_meta,
    read_slice,
    steps_in,
    write_slices,
)

CARRIED_FOLDER = "carried"  # inside the folder of a step
EXPORT_FOLDER = "hf"  # inside a workdir
# A converted model has had no update here.
FIRST_STEP = 0
SEQ_LEN = 1024  # of the config beside converted weights, where the context is as long


def open_model(
    path: str,
    step: int,
    say: Callable[[str], None],
    tokenizer: str = "",
    ignored: tuple[str, ...] = (),
    mirror: str = MIRROR,
    base: str = "",
) -> Origin:
    """The model at a path: a foreign directory, or a checkpoint of ours, which may be at a URL.

    `base` is where the weights beneath adapters are now, if they have moved.
    Raises UsageError for what cannot be used, and NoCheckpoint for damage.
    """
    if is_foreign(path):
        if step:
            raise UsageError(f"--step={step}: {path} has no steps; leave it out")
        choose_base({}, base, path)
        origin = open_foreign(path, ignored, tokenizer)

        def make_lineage():
            return [make_foreign_entry(origin, digest_files(origin.files))]

        return origin._replace(lineage=make_lineage)
    for flag, value in (("tokenizer", tokenizer), ("ignore_keys", " ".join(ignored))):
        if value:
            raise UsageError(f"--{flag}={value}: {path} is a checkpoint of ours; leave it out")
    return open_native(path, step, say, mirror, base)


def open_native(
    path: str, step: int, say: Callable[[str], None], mirror: str = MIRROR, base: str = ""
) -> Origin:
    """The weights of a checkpoint of ours, the averaged ones if the run kept them."""
    directory, number = find_checkpoint(path, step, say, mirror)
    return open_step(directory, number, path if is_remote(path) else "", base=base)


def open_base(base: dict[str, Any], name: str) -> Origin:
    """The weights beneath the adapters of the checkpoint `name`, compared with their fingerprint.

    Raises UsageError if they cannot be read or are others.
    """
    place, step = split_step(base["from"])
    try:
        if is_foreign(place):
            origin = open_foreign(place)
        else:
            directory, number = find_checkpoint(place, step, lambda line: None)
            item = "ema" if base["averaged"] else "params"
            origin = open_step(directory, number, item=item)
    except (UsageError, NoCheckpoint) as error:
        raise explain_base(base, error, name) from None
    own = fingerprint_slices(origin.shapes, find_depths(origin.model), origin.read)
    check_fingerprint(base, own, name)
    return origin


def open_step(
    directory: Path, number: int, path: str = "", item: str = "", base: str = ""
) -> Origin:
    """The weights of a step, whose files are not verified. It needs no other process.

    `path` names the run, if it is not the folder above `directory`. `item` is `params` or `ema`,
    and without it the averaged weights are taken where the run kept them. Adapters are merged.
    `base` is where the weights beneath them are now, if they have moved.
    """
    meta = read_meta(directory, number, META_SCHEMA)
    config = read_config(meta, directory, number)
    folder = directory / str(number)
    item = item or ("ema" if config.train.ema else "params")

    name = f"step {number} of {path or directory}"
    shapes = list_shapes(config.model)

    read: Callable[[str, Any], np.ndarray] = partial(read_slice, folder, item)
    beneath = choose_base(meta, base, name)
    if beneath is not None:
        read = read_merged(
            open_base(beneath, name), read_adapters(folder, item, config.lora, shapes), config.lora
        )

    return Origin(
        name=name,
        model=config.model,
        shapes=shapes,
        read=read,
        tokenizer=read_tokenizer(meta, directory, number),
        carried=read_carried(folder),
        facts={
            "step": number,
            "tokens seen": count_tokens(meta, config, directory),
            "weights": "averaged" if item == "ema" else "last",
        },
        lineage=lambda: [
            *meta.get("lineage", []),
            make_run_entry(meta, config, directory, number, path),
        ],
        tasks=read_tasks(meta),
    )


def export_adapters(
    path: str,
    step: int,
    target: Path,
    say: Callable[[str], None],
    family: str = "",
    mirror: str = MIRROR,
    base: str = "",
) -> str:
    """Writes the adapters of a checkpoint as a directory for `peft`. Returns what was written.

    `base` is where the weights beneath them are now, if they have moved. Raises UsageError for a
    checkpoint without adapters, and as `write_peft` does.
    """
    if is_foreign(path):
        raise UsageError(f"--format=peft: {path} is no checkpoint of ours; give a workdir")
    directory, number = find_checkpoint(path, step, say, mirror)
    meta = read_meta(directory, number, META_SCHEMA)
    config = read_config(meta, directory, number)
    if not config.lora.rank:
        raise UsageError(
            f"--format=peft: step {number} of {directory} has no adapters; write it as hf"
        )
    origin = open_step(directory, number, path if is_remote(path) else "", base=base)
    item = "ema" if config.train.ema else "params"
    adapters = read_adapters(directory / str(number), item, config.lora, origin.shapes)
    place, at = split_step(base or meta["base"]["from"])
    write_peft(origin, config.lora, adapters, place, target, family)
    if not is_foreign(place):
        which = f" --step={at}" if at else ""
        say(
            f"its base is a checkpoint of ours, which peft cannot read; write it with gpt-jax "
            f"convert --from={place}{which}, and name that place where it is loaded"
        )
    return origin.name


def read_carried(folder: Path) -> dict[str, bytes]:
    """The files of another project that a step has kept, by name."""
    return {file.name: file.read_bytes() for file in sorted((folder / CARRIED_FOLDER).glob("*"))}


def check_export(config: configs.Config) -> None:
    """Raises UsageError if a run is to be exported whose model no family has.

    `config` is resolved, up to the size of a vocabulary that is not known yet.
    """
    if config.checkpoint.export == "none":
        return
    model = replace(config.model, vocab=config.model.vocab or 1)
    try:
        write_config(model)
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(f"config.checkpoint.export = 'hf': {first}", *rest) from None


def export_step(
    config: configs.Config,
    directory: Path,
    step: int,
    say: Callable[[str], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Writes a checkpoint of a run in the form that its config asks for, unless it is there.

    It is read from the disk, so no device holds the weights a second time. One process does it.
    `directory` is that of the checkpoints. `look` is called before each part is read, and may raise
    to give up.
    """
    target = directory.parent / EXPORT_FOLDER / str(step)
    if config.checkpoint.export == "none" or target.exists():
        return
    # A run that has come to its end keeps what it has. The line says what is wrong with it.
    origin = open_step(directory, step)

    def read(path, index):
        look()
        return origin.read(path, index)

    write_directory(
        origin._replace(read=read),
        target,
        meet_nonfinite=lambda line: say(f"step {step}: {line}"),
    )
    say(f"step {step} as a directory of Hugging Face: {target}")


def average(origins: Sequence[Origin], weights: Sequence[float]) -> Origin:
    """A model whose parameters are the weighted mean of several. `weights` sum to 1.

    Raises UsageError if the models are not of one shape.
    """
    first = origins[0]
    for other in origins[1:]:
        if find_meaning(other.model) != find_meaning(first.model):
            raise UsageError(f"{other.name} and {first.name} are other models; average of one kind")
        tokenizers = [one.tokenizer.fingerprint for one in (first, other) if one.tokenizer]
        if len(set(tokenizers)) > 1:
            raise UsageError(f"{other.name} and {first.name} have other tokenizers")

    def read(path, index):
        total = np.zeros((), np.float64)
        for origin, weight in zip(origins, weights, strict=True):
            total = total + weight * origin.read(path, index).astype(np.float64)
        return total.astype(np.float32)

    names = ", ".join(origin.name for origin in origins)
    tasks = [note for origin in origins for note in origin.tasks]
    return first._replace(
        name=f"the mean of {names}",
        read=read,
        tasks=tuple(dict.fromkeys(tasks)),
        lineage=lambda: [entry for origin in origins for entry in origin.lineage()],
    )


def check_vocabulary(
    model: configs.Model, tokenizer: Tokenizer | None, flags: str = "--tokenizer=SPEC"
) -> str:
    """A line about rows of the embedding that no token has, or "".

    `flags` are where a user names a tokenizer. Raises UsageError if there is none, or one with more
    tokens than the embedding has rows.
    """
    if tokenizer is None:
        raise UsageError(f"no tokenizer lies beside the weights; name one with {flags}")
    if tokenizer.vocab > model.vocab:
        raise UsageError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab} tokens, and the embedding "
            f"{model.vocab} rows; name the model's own with {flags}"
        )
    if tokenizer.vocab == model.vocab:
        return ""
    return (
        f"the embedding has {model.vocab} rows for {tokenizer.vocab} tokens: rows "
        f"{tokenizer.vocab} to {model.vocab - 1} are padding"
    )


def make_config(model: configs.Model, tokenizer: Tokenizer | None = None) -> configs.Config:
    """The config that is written beside converted weights.

    Documents begin as the model of `tokenizer` was trained, so held-out text is measured so.
    """
    train = configs.Train(seq_len=min(model.max_seq, SEQ_LEN))
    data = configs.Data(begin=begins_documents(tokenizer))
    config = configs.Config(model=model, data=data, train=train)
    return replace(configs.resolve(config), model=model)


def write_native(
    origin: Origin,
    workdir: Path,
    say: Callable[[str], None],
    meet_nonfinite: Callable[[str], None] = refuse_nonfinite,
) -> None:
    """Writes a checkpoint of ours into a new workdir.

    `meet_nonfinite` gets a line if weights are NaN or infinite, before the checkpoint is whole. By
    default that is refused. Raises UsageError if the workdir has checkpoints, and for a tokenizer
    that does not fit. Raises SaveFailed if the disk does not take it.
    """
    origin, nonfinite = watch(origin)
    directory = workdir.absolute() / CHECKPOINT_FOLDER
    if any((directory / str(step) / MANIFEST).exists() for step in steps_in(directory)):
        raise UsageError(f"{workdir}: has checkpoints already; name a new directory")
    line = check_vocabulary(origin.model, origin.tokenizer)
    if line:
        say(line)

    depths = find_depths(origin.model)

    def lazy(path: str) -> Lazy:
        return Lazy(origin.shapes[path], depths[path], lambda index: origin.read(path, index))

    assert origin.tokenizer is not None
    meta = {
        "config": configs.to_dict(make_config(origin.model, origin.tokenizer)),
        "tokenizer": origin.tokenizer.to_json(),
        "data": {"next": 0, "content": ""},
        "lineage": origin.lineage(),
    }
    if origin.tasks:
        meta["tasks"] = [note.to_json() for note in origin.tasks]
    write_slices(
        directory,
        FIRST_STEP,
        {path: lazy(path) for path in origin.shapes},
        meta,
        {f"{CARRIED_FOLDER}/{name}": content for name, content in origin.carried.items()},
        lambda: meet_nonfinite(describe_nonfinite(nonfinite)) if nonfinite else None,
    )
