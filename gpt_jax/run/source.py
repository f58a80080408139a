"""The checkpoint of another run that a new run starts from, and what both must have in common."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.cluster import agree_on
from gpt_jax.data import TEMPLATE_FILES, Tokenizer, is_remote
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.interop import (
    TOKENIZER_FILES,
    find_tokenizer,
    is_foreign,
    load_params,
    open_foreign,
    read_foreign_model,
)
from gpt_jax.run.adapters import restore_merged
from gpt_jax.run.convert import make_config, read_carried
from gpt_jax.run.fetch import MIRROR, find_checkpoint, peek_checkpoint, split_step
from gpt_jax.run.lineage import digest_files, make_foreign_entry, make_run_entry
from gpt_jax.run.meta import META_SCHEMA, read_config, read_tokenizer
from gpt_jax.train import (
    CHECKPOINT_FOLDER,
    MANIFEST,
    read_meta,
    restore_checkpoint,
    steps_in,
)

# Fields of config.model that another run may set otherwise. Each changes what the model does with
# its weights, and training adapts the weights to that. All others decide what the weights are.
FREE = (
    "attention_dropout",
    "balance",
    "balance_rate",
    "balance_weight",
    "capacity_factor",
    "dispatch",
    "dropout",
    "init",
    "last_window_full",
    "logit_softcap",
    "max_seq",
    "rope_base",
    "rope_local_base",
    "rope_scale_factor",
    "rope_scale_high",
    "rope_scale_low",
    "rope_scale_original_seq",
    "rope_scaling",
    "router_z_loss",
    "vocab",
    "vocab_multiple",
    "windows",
)


class Source(NamedTuple):
    """The weights that a run starts from: a checkpoint, or a directory of another project.

    `restore` reads trees as `restore_checkpoint` does. `lineage` are the places that the weights
    come from, oldest first, this one last. `carried` are files that go with the model, by name.
    """

    name: str  # for people
    config: configs.Config
    tokenizer: Tokenizer | None  # None if none lies beside the weights
    lineage: list[dict[str, Any]]
    restore: Callable[[dict[str, Any]], dict[str, Any]]
    has_moments: bool = True
    carried: Mapping[str, bytes] = MappingProxyType({})


def make_source(directory: Path, step: int, meta: dict, path: str = "") -> Source:
    """The source that is a checkpoint. Raises UsageError if its config cannot be used.

    `path` names the run, if it is not the folder above `directory`.
    """
    config = read_config(meta, directory, step)

    def restore(trees):
        if not config.lora.rank:
            return restore_checkpoint(directory, step, trees)
        return {
            item: restore_merged(
                open_source, meta["base"], config.lora, directory, step, item, like, silence
            )
            for item, like in trees.items()
        }

    return Source(
        f"step {step} of {directory}",
        config,
        read_tokenizer(meta, directory, step),
        [*meta.get("lineage", []), make_run_entry(meta, config, directory, step, path)],
        restore,
        has_moments=not config.lora.rank,
        carried=read_carried(directory / str(step)),
    )


def silence(line: str) -> None:
    """Drops a line about weights that lie beneath those that somebody asked for."""


def make_foreign_source(path: str) -> Source:
    """The source that is a directory of another project. Raises UsageError if it cannot be used."""
    origin = open_foreign(path)
    # Process 0 writes checkpoints, so it alone reads the files for their digests.
    digests: dict[str, str] = {}
    agree_on(lambda: digests.update(digest_files(origin.files)))
    return Source(
        path,
        make_config(origin.model),
        origin.tokenizer,
        [make_foreign_entry(origin, digests)],
        lambda trees: {"params": load_params(origin.read, trees["params"])},
        has_moments=False,
        carried=origin.carried,
    )


def read_start_tokenizer(config: configs.Config, workdir: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a run that starts from a checkpoint, if the config names none itself.

    It is that of the run's newest checkpoint in `workdir`. A run that has none yet gets that of the
    checkpoint it starts from. Later that one is not needed, because it may be gone by then.

    The files of the checkpoints are not verified. Raises UsageError for a path that does not exist.
    """
    if not config.init.from_ or config.data.tokenizer:
        return None
    if workdir is not None and (workdir / CHECKPOINT_FOLDER).is_dir():
        # What is wrong with the run's own checkpoints is said where the run is resumed.
        with suppress(UsageError, NoCheckpoint):
            return _peek_tokenizer(workdir, 0)
    with naming_field(config.init):
        return _peek_tokenizer(*split_step(config.init.from_), config.checkpoint.mirror)


def _peek_tokenizer(path: str | Path, step: int, mirror: str = MIRROR) -> Tokenizer:
    if is_foreign(path):
        found = find_tokenizer(Path(path))
        if found is None:
            raise UsageError("no tokenizer lies beside the weights; set config.data.tokenizer")
        return found
    meta, directory = peek_checkpoint(path, step, mirror)
    return read_tokenizer(meta, directory, meta["step"])


def copy_tokenizer(workdir: Path, folder: Path) -> None:
    """Writes the tokenizer of a run's newest checkpoint, and its chat template if it has one.

    The checkpoint's files are not verified. Raises UsageError if there is none.
    """
    directory = workdir / CHECKPOINT_FOLDER
    meta, _ = peek_checkpoint(directory, 0)
    tokenizer = read_tokenizer(meta, directory, meta["step"])
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    carried = read_carried(directory / str(meta["step"]))
    for name in TEMPLATE_FILES:
        if name in carried:
            (folder / name).write_bytes(carried[name])


@contextmanager
def naming_field(init: configs.Init) -> Iterator[None]:
    """Puts the field in front of every refusal inside."""
    try:
        yield
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(f"config.init.from = {init.from_!r}: {first}", *rest) from None


def find_source(init: configs.Init, say, mirror: str = MIRROR) -> Source:
    """The checkpoint that `init.from` names, whose files are whole.

    That of a URL is copied below `mirror`. Raises UsageError for a path or a step that does not
    exist, and NoCheckpoint for damage.
    """
    with naming_field(init):
        return open_source(init.from_, say, mirror, init.optimizer)


def open_source(place: str, say, mirror: str = MIRROR, has_moments: bool = False) -> Source:
    """The weights at a place as config.init.from writes it. It raises what `find_source` does.

    Of a URL, moments are copied only with `has_moments`.
    """
    path, step = split_step(place)
    if is_foreign(path):
        return make_foreign_source(path)
    directory, number = find_checkpoint(path, step, say, mirror, has_moments)
    meta = read_meta(directory, number, META_SCHEMA)
    return make_source(directory, number, meta, path if is_remote(path) else "")


def peek_config(path: str | Path, step: int, mirror: str = MIRROR) -> configs.Config:
    """The config of the weights at a path, whose files are not verified."""
    if is_foreign(path):
        return make_config(read_foreign_model(path))
    meta, directory = peek_checkpoint(path, step, mirror)
    return read_config(meta, directory, meta["step"])


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has a step that is finished."""
    directory = workdir / CHECKPOINT_FOLDER
    return any((directory / str(step) / MANIFEST).exists() for step in steps_in(directory))


def take_model(
    config: configs.Config, workdir: Path | None, say: Callable[[str], None] = lambda line: None
) -> configs.Config:
    """The config with the model of the weights it starts from, if it asks for that.

    Fields of FREE that the config sets itself stay. Others are set aside, and `say` gets a line. A
    run that has a checkpoint takes the model from there, because the other may be gone. Raises
    UsageError for a path that does not exist.
    """
    if config.init.model != "checkpoint":
        return config
    if not config.init.from_:
        raise UsageError("config.init.model = 'checkpoint': needs config.init.from")
    if workdir and has_checkpoint(workdir):
        model = peek_config(workdir, 0).model
    else:
        with naming_field(config.init):
            model = peek_config(*split_step(config.init.from_), config.checkpoint.mirror).model
    own = {
        spec.name: getattr(config.model, spec.name)
        for spec in fields(config.model)
        if getattr(config.model, spec.name) != spec.default
    }
    aside = [
        f"{name} = {value!r}"
        for name, value in own.items()
        if name not in FREE and value != getattr(model, name)
    ]
    if aside:
        say(f"config.init.model = 'checkpoint': set aside of config.model: {', '.join(aside)}")
    free = {name: value for name, value in own.items() if name in FREE}
    return replace(config, model=replace(model, **free))


def check_start(config: configs.Config, workdir: Path | None) -> None:
    """Refuses early what `find_source` and `check_source` would refuse behind the text.

    `config` is resolved. Files are not verified. A run that has a checkpoint of its own does not
    need the other. Raises UsageError for a path or a step that does not exist, and for weights
    that mean something else.
    """
    if not config.init.from_:
        return
    if workdir and steps_in(workdir / CHECKPOINT_FOLDER):
        return
    # A damaged checkpoint is told, or passed over, where it is read.
    with naming_field(config.init), suppress(NoCheckpoint):
        mirror = config.checkpoint.mirror
        compare_models(peek_config(*split_step(config.init.from_), mirror), config)


def compare_models(source: configs.Config, config: configs.Config) -> list[str]:
    """A line for each field of the model that differs from the source's, for resolved configs.

    Raises UsageError if the weights would mean something else in this run.
    """
    old = configs.flatten(source)
    new = configs.flatten(config)
    differences = {
        name: f"config.model.{name} ({old[key]!r} there, {new[key]!r} here)"
        for key in new
        if key.startswith("model.") and old[key] != new[key]
        for name in [key.removeprefix("model.")]
    }
    blocked = [text for name, text in differences.items() if name not in FREE]
    if blocked:
        raise UsageError(
            f"its weights mean something else under {', '.join(blocked)}; use its values, "
            "or leave them out and set config.init.model=checkpoint"
        )
    return list(differences.values())


def keep_carried(source: Source, tokenizer: Tokenizer, say) -> dict[str, bytes]:
    """The files of the source that a run keeps beside its weights, for an export.

    Where the run's tokenizer is another one, those of the source's tokenizer are left out, and
    `say` names them.
    """
    kept = dict(source.carried)
    if source.tokenizer and source.tokenizer.fingerprint == tokenizer.fingerprint:
        return kept
    left_out = [name for name in kept if name in TOKENIZER_FILES]
    if left_out:
        say(f"of another tokenizer than {tokenizer.name}, so not kept: {', '.join(left_out)}")
    return {name: content for name, content in kept.items() if name not in left_out}


def check_source(source: Source, config: configs.Config, tokenizer: Tokenizer) -> list[str]:
    """A line for each field of the model that differs, for a resolved config.

    Raises UsageError if the weights would mean something else in this run, or if the checkpoint
    lacks what is asked of it.
    """
    with naming_field(config.init):
        differences = compare_models(source.config, config)
    if config.init.averaged and not source.config.train.ema:
        raise UsageError(
            f"config.init.averaged = True: {source.name} keeps no averaged weights; leave it out"
        )
    if config.init.optimizer and not source.has_moments:
        raise UsageError(
            f"config.init.optimizer = True: {source.name} has no moments; leave it out"
        )
    if config.lora.rank and source.config.lora.rank:
        # Merged weights are rounded otherwise on another mesh, and have no fingerprint.
        raise UsageError(
            f"config.init.from = {config.init.from_!r}: holds adapters itself, and others cannot "
            "lie on them; merge it first, with gpt-jax convert --format=native"
        )
    if source.tokenizer is None:
        return [*differences, f"its ids are taken for those of the tokenizer {tokenizer.name}"]
    if not tokenizer.extends(source.tokenizer):
        raise UsageError(
            f"config.init.from = {config.init.from_!r}: its ids are those of the tokenizer "
            f"{source.tokenizer.name} ({source.tokenizer.fingerprint}), and this run's is "
            f"{tokenizer.name} ({tokenizer.fingerprint}); leave config.data.tokenizer empty to "
            "use the checkpoint's"
        )
    return differences
