"""The state that a run starts from: fresh, or that of its newest valid checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.data import make_examples
from gpt_jax.errors import UsageError
from gpt_jax.run.adapters import make_base_entry, restore_base
from gpt_jax.run.convert import read_carried
from gpt_jax.run.meta import META_SCHEMA, read_config, read_past_sizes
from gpt_jax.run.parts import Parts
from gpt_jax.run.source import check_source, find_source, keep_carried, open_source
from gpt_jax.run.warm_start import load_weights, start_from
from gpt_jax.train import BASE, TrainState, make_schedule, read_meta, restore_checkpoint


def check_resume(
    parts: Parts,
    meta: dict,
    old_config: configs.Config,
    past: configs.BatchSizes,
    folder: Path,
    say,
) -> list[str]:
    """Says and returns what has changed in the config since a checkpoint.

    `old_config` and `past` are the checkpoint's config and batch sizes. `folder` is the workdir.
    Raises UsageError if a change alters what the saved arrays mean or what was trained on already,
    or if tokenizer or text are others.
    """
    changes = configs.changes(old_config, parts.config)
    examples = past.examples(meta["step"])
    refusal = check_phases(parts, old_config, examples)
    refusal = refusal or check_batch_size(parts.config.train, old_config.train, examples)

    allowed = []
    blocked = []
    for key, old, new, effect in changes:
        if key == "init.from" and old_config.lora.rank:
            effect = "the weights beneath the adapters are read there"
        line = f"config.{key} changed since the checkpoint: {old!r} -> {new!r}"
        if effect is None:
            say(f"{line} (not possible)")
            blocked.append(f"config.{key} ({old!r} there, {new!r} now)")
        else:
            say(f"{line}: {effect}" if effect else line)
            allowed.append(f"{key}: {old!r} -> {new!r}")
    if blocked:
        raise UsageError(
            f"{folder} holds a run with another {', '.join(blocked)}; use its values, another "
            "--workdir, or start a new run from its weights with config.init.from"
        )
    if refusal:
        raise UsageError(refusal)
    say_rate(old_config, parts.config, meta["step"], say)
    for line in describe_sizes(old_config, parts.config, past, meta["step"]):
        say(line)
    check_text(parts, meta, folder)
    for line in describe_sets(meta["data"].get("sets", {}), parts.data.set_digests):
        say(line)
    return allowed


def describe_sets(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each held-out set that has another text than at the checkpoint, by its digest."""
    return [
        f"config.eval.sets: the text of {name} has changed since the checkpoint, so its curve goes "
        "on with another text"
        for name, digest in now.items()
        if before.get(name, digest) != digest
    ]


def check_text(parts: Parts, meta: dict, folder: Path) -> None:
    """Raises UsageError if tokenizer or text are not those of the run in `folder`."""
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


def check_phases(parts: Parts, old: configs.Config, examples: int) -> str:
    """Why the phases of the mixture cannot change after so many examples, or "" if they can."""
    data = parts.config.data
    if data.phases == old.data.phases or parts.examples.mix is None:
        return ""
    train = parts.config.train
    before = replace(data, phases=old.data.phases)
    old_mix = make_examples(parts.data, before, train.seq_len, parts.config.seed).mix
    assert old_mix is not None, "the sources are the same, so there is a mixture"
    first = parts.examples.mix.find_difference(old_mix)
    if first is None or first >= examples:
        return ""
    return (
        f"config.data.phases = {data.phases!r}: differs from the run's {old.data.phases!r} at "
        f"token {first * train.seq_len:,}, and the run is at token "
        f"{examples * train.seq_len:,} already; change later phases alone"
    )


def check_batch_size(train: configs.Train, old: configs.Train, examples: int) -> str:
    """Why a changed batch size would do nothing after so many examples, or "" if it does."""
    entry = configs.find_ramp_entry(train, examples)
    if entry is None or train.batch_size == old.batch_size:
        return ""
    later = train.batch_ramp[entry + 1 :]
    return (
        f"config.train.batch_size = {train.batch_size}: does nothing at token "
        f"{examples * train.seq_len:,}, where config.train.batch_ramp[{entry}] = "
        f"{train.batch_ramp[entry]} counts; change that entry, and leave this as it was "
        f"({old.batch_size}), or leave out the entries that are past with "
        f"--config.train.batch_ramp={_format_ramp(later)}, and this counts from here on"
    )


def _format_ramp(ramp: tuple[tuple[int, int, int], ...]) -> str:
    """A ramp as one word of a shell's command line, in quotes."""
    return f'"{ramp}"'.replace(" ", "")


def describe_sizes(
    old: configs.Config, new: configs.Config, past: configs.BatchSizes, step: int
) -> list[str]:
    """Lines about what other batch sizes from `step` on mean for the run; [] for the same ones."""
    steps = new.train.steps
    seq_len = new.train.seq_len
    planned = configs.make_batch_sizes(old.train, past, step)
    sizes = configs.make_batch_sizes(new.train, past, step)
    is_changed = sizes.pairs(steps) != planned.pairs(steps)

    lines = []
    if sizes.cuts(steps) != planned.cuts(steps):
        lines.append(_describe_cut(seq_len, past, sizes, step))
    before = past.size(max(0, step - 1))
    after = sizes.size(step)
    if is_changed and after != before:
        lines.append(
            f"step {step + 1:,} goes on at example {past.examples(step):,}, with {after:,} rows "
            f"and {after * seq_len:,} tokens a step, after {before:,} rows and "
            f"{before * seq_len:,} tokens; no example is repeated or left out"
        )
    if is_changed:
        lines.append(
            f"the learning-rate schedule goes by steps: at step {steps:,} the run has read "
            f"{sizes.examples(steps) * seq_len:,} tokens, and with the batch sizes of before "
            f"{planned.examples(steps) * seq_len:,}"
        )
    if new.eval.batches and new.eval.batch_size != old.eval.batch_size:
        lines.append(
            f"an evaluation reads config.eval.batches = {new.eval.batches} of "
            f"{new.eval.batch_size} rows, after {old.eval.batch_size}, so it measures other text; "
            f"config.eval.batch_size={old.eval.batch_size} keeps its curve comparable"
        )
    before, after = (one.eval.stride or one.train.seq_len for one in (old, new))
    if before != after:
        lines.append(
            f"rows of held-out text move on by {after} tokens, after {before}, so a token sees "
            f"another context; config.eval.stride={old.eval.stride} keeps the curve comparable"
        )
    return lines


def _describe_cut(
    seq_len: int, past: configs.BatchSizes, sizes: configs.BatchSizes, step: int
) -> str:
    """A line about the rows from `step` on, which have other lengths than was planned."""
    before = seq_len // past.level(max(0, step - 1)).pieces
    after = seq_len // sizes.level(step).pieces
    change = f"stays at rows of {after:,} tokens for now"
    if after != before:
        change = f"goes on with rows of {after:,} tokens, after {before:,}"
    return f"step {step + 1:,} {change}; the examples of each update stay"


def say_rate(old: configs.Config, new: configs.Config, step: int, say) -> None:
    """Says how the learning rate jumps after `step`, if the schedule has changed."""
    before, after = (
        one.optim.learning_rate * float(make_schedule(one.optim)(step)) for one in (old, new)
    )
    if before != after:
        say(f"the learning rate of step {step + 1} is {after:.3g}, and {before:.3g} before")


class Start(NamedTuple):
    """What a session starts from."""

    state: TrainState
    changed: list[str]  # in the config, since the checkpoint
    lineage: list[dict[str, Any]]  # the other runs whose weights these are, see source.Source
    sizes: configs.BatchSizes  # the rows of each update, from the first one of the run
    carried: Mapping[str, bytes]  # files that are kept beside the weights, see source.Source
    base: dict[str, Any] | None = None  # what lies beneath adapters, see adapters.make_base_entry
    frozen: Any = None  # what the steps get under that name


def start_state(parts: Parts, checkpoints, say) -> Start:
    """The state of the newest valid checkpoint, or that of a new run."""
    step = checkpoints.latest
    if step is None:
        return start_new(parts, say)
    directory = checkpoints.directory
    meta = read_meta(directory, step, META_SCHEMA)
    config = read_config(meta, directory, step)
    past = read_past_sizes(meta, config, directory)

    changed = check_resume(parts, meta, config, past, directory.parent, say)
    base = None
    frozen = None
    if parts.base is not None:
        name = f"step {step} of {directory}"
        open_base = partial(open_source, mirror=parts.config.checkpoint.mirror)
        beneath = meta["base"]
        if parts.config.init.from_ != config.init.from_:
            beneath = beneath | {"from": parts.config.init.from_}
        weights, base = restore_base(open_base, beneath, name, parts.base, say)
        frozen = {BASE: weights}
    loaded = restore_checkpoint(directory, step, state_items(parts.abstract))
    say(f"resumed from step {step} of {directory}")
    state = loaded["train"]._replace(params=loaded["params"], ema=loaded.get("ema", {}))
    sizes = configs.make_batch_sizes(parts.config.train, past, step)
    carried = read_carried(directory / str(step))
    return Start(state, changed, meta.get("lineage", []), sizes, carried, base, frozen)


def start_new(parts: Parts, say) -> Start:
    """The state of a new run: fresh, or the weights of the checkpoint that the config names."""
    sizes = configs.make_batch_sizes(parts.config.train)
    if not parts.config.init.from_:
        return Start(parts.init(), [], [], sizes, {})
    source = find_source(parts.config.init, say, parts.config.checkpoint.mirror)
    changed = check_source(source, parts.config, parts.data.tokenizer)
    carried = keep_carried(source, parts.data.tokenizer, say)
    about = changed, source.lineage, sizes, carried
    if parts.base is None:
        return Start(start_from(parts, source, say), *about)
    weights = load_weights(parts, source, say).params
    base = make_base_entry(parts.config.init, source.lineage, weights)
    return Start(parts.start(weights), *about, base, {BASE: weights})


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint. `ema` is one of them if the run keeps averages."""
    items = {"params": state.params, "train": state._replace(params={}, ema={})}
    if state.ema:
        items["ema"] = state.ema
    return items
