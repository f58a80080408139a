"""The checkpoint of another run that a new run starts from, and what both must have in common."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.data import Tokenizer
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.run.meta import META_SCHEMA, count_tokens, read_config, read_tokenizer
from gpt_jax.train import CHECKPOINT_FOLDER, peek_meta, read_meta, resolve_checkpoint, steps_in

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
    """A checkpoint that a run starts from."""

    directory: Path  # the folder of checkpoints
    step: int
    meta: dict
    config: configs.Config

    @property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.meta, self.directory, self.step)

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The checkpoints that the weights come from, oldest first, this one last."""
        own = {
            "from": str(self.directory.parent),
            "step": self.step,
            "tokens": count_tokens(self.meta, self.config, self.directory),
            "data": self.config.data.where,
            "content": self.meta["data"]["content"],
        }
        return [*self.meta.get("lineage", []), own]


def split_step(text: str) -> tuple[str, int]:
    """ "runs/a@300" -> ("runs/a", 300). Without a step it is 0, which is the newest.

    A text that is a path as a whole has no step.
    """
    path, at, step = text.rpartition("@")
    has_step = at and step.isdecimal() and not Path(text).exists()
    return (path, int(step)) if has_step else (text, 0)


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
        return _peek_tokenizer(*split_step(config.init.from_))


def _peek_tokenizer(path: str | Path, step: int) -> Tokenizer:
    meta = peek_meta(path, step, META_SCHEMA)
    return read_tokenizer(meta, Path(path), meta["step"])


@contextmanager
def naming_field(init: configs.Init) -> Iterator[None]:
    """Puts the field in front of every refusal inside."""
    try:
        yield
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(f"config.init.from = {init.from_!r}: {first}", *rest) from None


def find_source(init: configs.Init, say) -> Source:
    """The checkpoint that `init.from` names, whose files are whole.

    Raises UsageError for a path or a step that does not exist, and NoCheckpoint for damage.
    """
    with naming_field(init):
        directory, number = resolve_checkpoint(*split_step(init.from_), say, META_SCHEMA)
        meta = read_meta(directory, number, META_SCHEMA)
        return Source(directory, number, meta, read_config(meta, directory, number))


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
        path, step = split_step(config.init.from_)
        meta = peek_meta(path, step, META_SCHEMA)
        compare_models(read_config(meta, Path(path), meta["step"]), config)


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
            f"its weights mean something else under {', '.join(blocked)}; use its values"
        )
    return list(differences.values())


def check_source(source: Source, config: configs.Config, tokenizer: Tokenizer) -> list[str]:
    """A line for each field of the model that differs, for a resolved config.

    Raises UsageError if the weights would mean something else in this run, or if the checkpoint
    lacks what is asked of it.
    """
    with naming_field(config.init):
        differences = compare_models(source.config, config)
    if config.init.averaged and not source.config.train.ema:
        raise UsageError(
            f"config.init.averaged = True: {source.directory} keeps no averaged weights; leave it "
            "out"
        )
    if not tokenizer.extends(source.tokenizer):
        raise UsageError(
            f"config.init.from = {config.init.from_!r}: its ids are those of the tokenizer "
            f"{source.tokenizer.name} ({source.tokenizer.fingerprint}), and this run's is "
            f"{tokenizer.name} ({tokenizer.fingerprint}); leave config.data.tokenizer empty to "
            "use the checkpoint's"
        )
    return differences
