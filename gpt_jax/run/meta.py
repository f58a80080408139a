"""What a run adds to the meta.json of its checkpoints, and how it is read back."""

from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.data import TaskNote, Tokenizer, tokenizer_from_json
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.schema import Each, Misfit

# What `loop.save` writes. Checkpoints of earlier versions have no lineage, no digests in it, no
# digests of held-out sets, and no batch sizes. Row lengths are there if any row was cut.
# Tasks are those of the training data.
META_SCHEMA = {
    "config": "object",
    "tokenizer": "text",
    "data": {
        "next": "count",
        "content": "text",
        "sets?": Each("text"),
        "batch_sizes?": [("count", "count")],
        "row_lengths?": [("count", "count")],
    },
    # What lies beneath adapters. Its fields are those of `adapters.make_base_entry`.
    "base?": {"from": "text", "averaged": "flag", "fingerprint": "text"},
    "lineage?": [
        {
            "from": "text",
            "step": "count",
            "tokens": "count",
            "data": "text",
            "content": "text",
            "family?": "text",
            "digests?": Each("text"),
        }
    ],
    "tasks?": [{"task": "text", "options": Each("text")}],
}


def read_tasks(meta: dict) -> tuple[TaskNote, ...]:
    """The tasks that a checkpoint was trained on."""
    return tuple(
        TaskNote(note["task"], tuple(note["options"].items())) for note in meta.get("tasks", [])
    )


def read_config(meta: dict, directory: Path, step: int) -> configs.Config:
    """The config of a checkpoint. Raises UsageError if this version does not know its fields."""
    try:
        return configs.read_saved(meta["config"])
    except UsageError as error:
        first, *rest = error.args
        raise UsageError(
            f"checkpoint step {step} in {directory}: its config cannot be used: {first}", *rest
        ) from None


def write_sizes(sizes: configs.BatchSizes, step: int, train: configs.Train) -> dict[str, list]:
    """The batch sizes and row lengths of the first `step` updates, as `read_past_sizes` reads."""
    written: dict[str, list] = {"batch_sizes": sizes.pairs(step)}
    cuts = sizes.cuts(step)
    if any(pieces > 1 for _, pieces in cuts):
        written["row_lengths"] = [(begin, train.seq_len // pieces) for begin, pieces in cuts]
    return written


def read_past_sizes(meta: dict, config: configs.Config, directory: Path) -> configs.BatchSizes:
    """The batch sizes of the updates that a checkpoint has behind it. `config` is its own.

    A checkpoint without them is of a version where a run had one batch size. Without row lengths no
    row was cut. Raises NoCheckpoint if they make no run.
    """
    step = meta["step"]
    seq_len = config.train.seq_len
    pairs = meta["data"].get("batch_sizes")
    if pairs is None:
        pairs = [(0, config.train.batch_size)]
    lengths = meta["data"].get("row_lengths", [(0, seq_len)])
    try:
        for begin, length in lengths:
            if length < 1 or seq_len % length:
                raise ValueError(f"rows of {length} tokens from step {begin} on")
        return configs.read_batch_sizes(
            pairs, [(begin, seq_len // length) for begin, length in lengths]
        )
    except ValueError as error:
        raise NoCheckpoint(
            f"checkpoint step {step} in {directory}: its position cannot be used: {error}"
        ) from None


def count_tokens(meta: dict, config: configs.Config, directory: Path) -> int:
    """The tokens that the updates behind a checkpoint have read. `config` is its own."""
    examples = read_past_sizes(meta, config, directory).examples(meta["step"])
    return examples * config.train.seq_len


def read_tokenizer(meta: dict, directory: Path, step: int) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises NoCheckpoint if its text has another shape."""
    try:
        return tokenizer_from_json(meta["tokenizer"])
    except Misfit as error:
        raise NoCheckpoint(
            f"checkpoint step {step} in {directory}: its tokenizer cannot be used: {error}"
        ) from None
