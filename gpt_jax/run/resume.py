"""The state that a run starts from: fresh, or that of its newest valid checkpoint."""

from pathlib import Path
from typing import Any

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.run.parts import Parts
from gpt_jax.train import TrainState, read_meta, restore_checkpoint

# What `loop.save` writes into meta.json.
META_SCHEMA = {
    "config": "object",
    "tokenizer": "text",
    "data": {"next": "count", "content": "text"},
}


def read_saved_config(meta: dict) -> configs.Config:
    """The Config that a checkpoint was written with, by this or an earlier version."""
    return configs.from_dict(configs.translate(meta["config"]))


def check_resume(parts: Parts, meta: dict, directory: Path, say) -> list[str]:
    """Says and returns what has changed in the config since a checkpoint.

    Raises UsageError if a change alters what the saved arrays mean, or if tokenizer or text are
    others.
    """
    folder = directory.parent
    allowed = []
    blocked = []
    for key, old, new, may_change in configs.changes(read_saved_config(meta), parts.config):
        line = f"config.{key} changed since the checkpoint: {old!r} -> {new!r}"
        if may_change:
            allowed.append(f"{key}: {old!r} -> {new!r}")
        else:
            line += " (not possible)"
            blocked.append(f"config.{key} ({old!r} there, {new!r} now)")
        say(line)

    if blocked:
        raise UsageError(
            f"{folder} holds a run with another {', '.join(blocked)}; use its values or another "
            "--workdir"
        )
    if meta["tokenizer"] != parts.data.tokenizer.to_json():
        raise UsageError(
            f"{folder} holds a run with another tokenizer: the text it is made from has changed; "
            "give the same text or another --workdir"
        )
    if meta["data"]["content"] != parts.data.content:
        raise UsageError(
            f"{folder} holds a run on another text than {parts.config.data.where} now; give the "
            "same text or another --workdir"
        )
    return allowed


def start_state(parts: Parts, checkpoints, say) -> tuple[TrainState, list[str]]:
    """The state of the newest valid checkpoint, or a fresh one, and what has changed since."""
    step = checkpoints.latest
    if step is None:
        return parts.init(), []
    meta = read_meta(checkpoints.directory, step, META_SCHEMA)
    changed = check_resume(parts, meta, checkpoints.directory, say)
    loaded = restore_checkpoint(checkpoints.directory, step, state_items(parts.abstract))
    say(f"resumed from step {step} of {checkpoints.directory}")
    state = loaded["train"]._replace(params=loaded["params"], ema=loaded.get("ema", {}))
    return state, changed


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint. `ema` is one of them if the run keeps averages."""
    items = {"params": state.params, "train": state._replace(params={}, ema={})}
    if state.ema:
        items["ema"] = state.ema
    return items
