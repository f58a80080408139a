"""The checkpoint of another run that a new run starts from, and what both must have in common."""

from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.data import Tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.run.meta import META_SCHEMA, read_tokenizer
from gpt_jax.train import peek_meta, read_meta, resolve_checkpoint

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
    "rope_scale_factor",
    "rope_scale_high",
    "rope_scale_low",
    "rope_scale_original_seq",
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
            "tokens": self.step * self.config.train.batch_size * self.config.train.seq_len,
            "data": self.config.data.where,
            "content": self.meta["data"]["content"],
        }
        return [*self.meta.get("lineage", []), own]


def split_step(text: str) -> tuple[str, int]:
    """ "runs/a@300" -> ("runs/a", 300). Without a step it is 0, which is the newest."""
    path, at, step = text.rpartition("@")
    return (path, int(step)) if at and step.isdecimal() else (text, 0)


def read_start_tokenizer(config: configs.Config) -> Tokenizer | None:
    """The tokenizer of the checkpoint that a run starts from, if the config names none itself.

    The files of the checkpoint are not verified. Raises UsageError for a path that does not exist.
    """
    if not config.init.from_ or config.data.tokenizer:
        return None
    path, step = split_step(config.init.from_)
    return read_tokenizer(peek_meta(path, step, META_SCHEMA), Path(path), step)


def find_source(init: configs.Init, say) -> Source:
    """The checkpoint that `init.from` names, whose files are whole.

    Raises UsageError for a path or a step that does not exist, and NoCheckpoint for damage.
    """
    try:
        directory, number = resolve_checkpoint(*split_step(init.from_), say, META_SCHEMA)
    except UsageError as error:
        raise UsageError(f"config.init.from = {init.from_!r}: {error}") from None
    meta = read_meta(directory, number, META_SCHEMA)
    return Source(directory, number, meta, configs.read_saved(meta["config"]))


def check_source(source: Source, config: configs.Config, tokenizer: Tokenizer) -> list[str]:
    """A line for each field of the model that differs, for a resolved config.

    Raises UsageError if the weights would mean something else in this run, or if the checkpoint
    lacks what is asked of it.
    """
    old = configs.flatten(source.config)
    new = configs.flatten(config)
    differences = {
        name: f"config.model.{name} ({old[key]!r} there, {new[key]!r} here)"
        for key in new
        if key.startswith("model.") and old[key] != new[key]
        for name in [key.removeprefix("model.")]
    }
    where = f"config.init.from = {config.init.from_!r}"
    blocked = [text for name, text in differences.items() if name not in FREE]
    if blocked:
        raise UsageError(
            f"{where}: its weights mean something else under {', '.join(blocked)}; use its values"
        )
    if config.init.averaged and not source.config.train.ema:
        raise UsageError(
            f"config.init.averaged = True: {source.directory} keeps no averaged weights; leave it "
            "out"
        )
    if not tokenizer.extends(source.tokenizer):
        raise UsageError(
            f"{where}: its ids are those of the tokenizer {source.tokenizer.name} "
            f"({source.tokenizer.fingerprint}), and this run's is {tokenizer.name} "
            f"({tokenizer.fingerprint}); leave config.data.tokenizer empty to use the checkpoint's"
        )
    return list(differences.values())
