"""What a run adds to the meta.json of its checkpoints, and how it is read back."""

from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.data import Tokenizer, tokenizer_from_json
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.schema import Misfit

# What `loop.save` writes. Checkpoints of earlier versions have no lineage.
META_SCHEMA = {
    "config": "object",
    "tokenizer": "text",
    "data": {"next": "count", "content": "text"},
    "lineage?": [
        {"from": "text", "step": "count", "tokens": "count", "data": "text", "content": "text"}
    ],
}


def read_config(meta: dict, directory: Path, step: int) -> configs.Config:
    """The config of a checkpoint. Raises UsageError if this version does not know its fields."""
    try:
        return configs.read_saved(meta["config"])
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(
            f"checkpoint step {step} in {directory}: its config cannot be used: {first}", *rest
        ) from None


def read_tokenizer(meta: dict, directory: Path, step: int) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises NoCheckpoint if its text has another shape."""
    try:
        return tokenizer_from_json(meta["tokenizer"])
    except Misfit as error:
        raise NoCheckpoint(
            f"checkpoint step {step} in {directory}: its tokenizer cannot be used: {error}"
        ) from None
