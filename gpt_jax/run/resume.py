"""The state that a run starts from: fresh, or that of its newest valid checkpoint."""

from pathlib import Path
from typing import Any

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.run.parts import Parts
from gpt_jax.train import TrainState, read_meta, restore_checkpoint


def read_saved_config(meta: dict) -> configs.Config:
    """The Config that a checkpoint was written with, by this or an earlier version."""
    return configs.from_dict(configs.translate(meta["config"]))


def check_resume(parts: Parts, meta: dict, directory: Path, say) -> None:
    """Reports every changed key; UsageError when one of them changes what the saved arrays mean."""
    found = configs.changes(read_saved_config(meta), parts.config)
    for key, old, new, may in found:
        say(
            f"config.{key} changed since the checkpoint: {old!r} -> {new!r}"
            + ("" if may else " (not possible)")
        )
    blocked = [
        f"config.{key} ({old!r} there, {new!r} now)" for key, old, new, may in found if not may
    ]
    if blocked:
        raise UsageError(
            f"{directory.parent} holds a run with another {', '.join(blocked)}; use its values or "
            "another "
            "--workdir"
        )
    if meta["tokenizer"] != parts.data.tokenizer.to_json():
        raise UsageError(
            f"{directory.parent} holds a run with another tokenizer: the text it is made from has "
            "changed; "
            "give the same text or another --workdir"
        )
    if meta["data"]["content"] != parts.data.content:
        raise UsageError(
            f"{directory.parent} holds a run on another text than {parts.config.data.where} now; "
            "give the same "
            "text or another --workdir"
        )


def start_state(parts: Parts, checkpoints, say) -> TrainState:
    """The state of the newest valid checkpoint, or a fresh one."""
    step = checkpoints.latest
    if step is None:
        return parts.init()
    check_resume(parts, read_meta(checkpoints.directory, step), checkpoints.directory, say)
    loaded = restore_checkpoint(checkpoints.directory, step, state_items(parts.abstract))
    say(f"resumed from step {step} of {checkpoints.directory}")
    return loaded["train"]._replace(params=loaded["params"], ema=loaded.get("ema", {}))


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint; `ema` only where the run keeps averages."""
    parts = {"params": state.params, "train": state._replace(params={}, ema={})}
    return parts | ({"ema": state.ema} if state.ema else {})
