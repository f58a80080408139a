"""What must agree between the fields of a config and the sizes of a mesh's axes."""

import math
from typing import NamedTuple

from gpt_jax.config.batch_sizes import list_levels
from gpt_jax.config.check_list import Checks
from gpt_jax.config.fields import Config
from gpt_jax.config.habits import GROUPED_WIDTH
from gpt_jax.config.layers import has_experts, layer_specs, layout
from gpt_jax.config.lookups import check_lookup
from gpt_jax.config.meshes import BATCH_AXES, COPY_AXES, FSDP_AXES
from gpt_jax.config.model_fields import Model
from gpt_jax.config.resolve import round_up
from gpt_jax.config.run_fields import Train


def mesh_faults(config: Config, shape: dict[str, int]) -> list[str]:
    """The disagreements of a config with a mesh of these axis sizes, a line each.

    The model must have a pattern and windows.
    """
    checks = Checks(config)
    _check_weights(checks, shape)
    check_lookup(checks, shape)
    _check_batch(checks, shape)
    _check_sequence(checks, shape)
    _check_experts(checks, shape)
    _check_stages(checks, shape)
    _check_copies(checks, shape)
    return checks.lines


def widest_tensor(model: Model, devices: int) -> int:
    """The largest part of `devices` that can be the mesh's axis tensor for a resolved model."""
    widths = [model.heads, model.kv_heads, model.mlp, model.vocab]
    if has_experts(model):
        widths.append(model.expert_mlp)
    return math.gcd(devices, *widths)


def _check_weights(checks: Checks, shape: dict) -> None:
    """Weights over the axis tensor and over the axes of fsdp."""
    model = checks.config.model
    tensor = shape["tensor"]
    split = math.prod(shape[axis] for axis in FSDP_AXES)

    for name in ("heads", "kv_heads", "mlp", "vocab"):
        size = getattr(model, name)
        if name == "vocab":
            way_out = (
                f"set it to {round_up(size, tensor)}, "
                f"or to 0 and config.model.vocab_multiple to {tensor}"
            )
        else:
            # The largest part of this axis that divides all three.
            fits = math.gcd(tensor, model.heads, model.kv_heads, model.mlp)
            way_out = f"lower that to {fits}"
        checks.need(
            size % tensor == 0,
            f"model.{name}",
            f"must be divisible by config.mesh.tensor = {tensor}; {way_out}",
        )

    checks.need(
        model.embed % split == 0,
        "model.embed",
        f"must be divisible by fsdp x expert x context = {split} of the mesh",
    )
    # The table of value embeddings is split over fsdp by its width, as the embedding is.
    value_width = model.kv_heads * model.head_dim
    checks.need(
        not model.value_embed or value_width % split == 0,
        "model.kv_heads",
        f"times config.model.head_dim = {model.head_dim} must be divisible by "
        f"fsdp x expert x context = {split} of the mesh (value_embed)",
    )

    _check_unroll(checks, split, shape["pipeline"])


def _check_unroll(checks: Checks, split: int, stages: int) -> None:
    """A loop over layers whose weights are gathered over `split` devices.

    JAX 0.10 has no gradient of it where it is unrolled in part and keeps those weights. Stages of a
    pipeline gather them in another way.
    """
    compute = checks.config.compute
    repeats = layout(layer_specs(checks.config.model)).repeats
    is_partial = 1 < compute.unroll < repeats
    checks.need(
        not is_partial or split == 1 or stages > 1 or compute.remat != "none",
        "compute.unroll",
        f"unrolls {repeats} repeats in part, and JAX 0.10 has no gradient of that where "
        f"fsdp x expert x context = {split} of the mesh gather weights; set 1 or 0, or "
        "config.compute.remat",
    )


class _Level(NamedTuple):
    """A batch shape of the config, and how a fault of it is told."""

    path: str  # the field of the batch size
    accumulate: str  # the name of its microbatches
    train: Train  # at this batch shape
    at_length: str  # the length of its rows, if that changes inside the run
    if_past: str  # the end of the line about a size that does not fit the mesh


def _name_levels(checks: Checks) -> list[_Level]:
    """All batch shapes of the config.

    A size without rows or microbatches is left out, because the checks of the fields refuse it.
    """
    asked = checks.config.train
    levels = []
    for train in list_levels(asked):
        size = train.batch_size // (asked.seq_len // train.seq_len)
        if size < 1 or train.accumulate < 1:
            continue
        path = "train.batch_size"
        accumulate = "config.train.accumulate"
        if size != asked.batch_size:
            entry = [rows for _, rows, _ in asked.batch_ramp].index(size)
            path = f"train.batch_ramp[{entry}]"
            accumulate = "the entry's accumulate"
        at_length = f", where rows have {train.seq_len:,} tokens" if asked.length_ramp else ""
        levels.append(_Level(path, accumulate, train, at_length, ""))

    # The checks of the fields do not know how far a run is that resumes on another mesh.
    if_past = ""
    if asked.batch_ramp:
        if_past = (
            "; if the run is past this size, leave out the entries of config.train.batch_ramp that "
            "have begun, and set config.train.batch_size and config.train.accumulate to the last "
            "of them"
        )
    return [*(level._replace(if_past=if_past) for level in levels[:-1]), *levels[-1:]]


def _check_batch(checks: Checks, shape: dict) -> None:
    """Rows over the axes of the batch."""
    parts = math.prod(shape[axis] for axis in BATCH_AXES)

    for path, accumulate, train, at_length, if_past in _name_levels(checks):
        checks.need(
            train.batch_size % train.accumulate == 0,
            path,
            f"must be divisible by {accumulate} = {train.accumulate}{at_length}",
        )
        micro = train.batch_size // train.accumulate
        pieces = checks.config.train.seq_len // train.seq_len
        multiple = parts * train.accumulate // math.gcd(parts * train.accumulate, pieces)
        way_out = f"try {round_up(train.batch_size // pieces, multiple)}"
        if train.batch_size % parts == 0:
            fewer = math.gcd(train.batch_size // parts, train.accumulate)
            way_out += f", or {accumulate}={fewer}"
        checks.need(
            micro % parts == 0,
            path,
            f"gives {micro} rows a microbatch, which must be divisible by pipeline x data x fsdp "
            f"x expert = {parts} of the mesh{at_length}; {way_out}{if_past}",
        )
    checks.need(
        checks.config.eval.batch_size % parts == 0,
        "eval.batch_size",
        f"must be divisible by pipeline x data x fsdp x expert = {parts} of the mesh",
    )


def _check_sequence(checks: Checks, shape: dict) -> None:
    """The sequence over the axis context and, between matmuls, over tensor."""
    train = checks.config.train
    pieces = shape["context"]
    parts = pieces * shape["tensor"]

    if pieces > 1:
        # Each device has two pieces, one from either end, so that causal work is balanced.
        checks.need(
            train.seq_len % (2 * pieces) == 0,
            "train.seq_len",
            f"must be divisible by 2 x config.mesh.context = {2 * pieces}; "
            f"try {round_up(train.seq_len, 2 * pieces)}",
        )
        checks.need(
            train.loss_chunk % pieces == 0,
            "train.loss_chunk",
            f"must be divisible by config.mesh.context = {pieces}",
        )
        checks.need(
            not checks.config.model.attention_dropout,
            "model.attention_dropout",
            f"is not possible with config.mesh.context = {pieces}: "
            "no device has a whole map; set 0",
        )
    checks.need(
        not checks.config.compute.shard_sequence or train.seq_len % parts == 0,
        "train.seq_len",
        f"must be divisible by context x tensor = {parts} of the mesh "
        "(config.compute.shard_sequence)",
    )
    _check_short_rows(checks, pieces, parts)


def _check_short_rows(checks: Checks, pieces: int, parts: int) -> None:
    """Rows of `train.length_ramp` over the axis context (`pieces`), and with tensor (`parts`)."""
    train = checks.config.train
    for i, (_, length) in enumerate(train.length_ramp):
        path = f"train.length_ramp[{i}]"
        checks.need(
            pieces == 1 or length % (2 * pieces) == 0,
            path,
            f"has rows of {length} tokens, which must be divisible by 2 x config.mesh.context = "
            f"{2 * pieces}; take another length",
        )
        chunk = train.loss_chunk * length // train.seq_len
        checks.need(
            chunk % pieces == 0,
            path,
            f"cuts the chunks of config.train.loss_chunk = {train.loss_chunk} to {chunk} tokens, "
            f"which must be divisible by config.mesh.context = {pieces}; raise the chunk",
        )
        checks.need(
            not checks.config.compute.shard_sequence or length % parts == 0,
            path,
            f"has rows of {length} tokens, which must be divisible by context x tensor = {parts} "
            "of the mesh (config.compute.shard_sequence); take another length",
        )


def _check_experts(checks: Checks, shape: dict) -> None:
    """The mixture of experts over the axes expert, tensor and context."""
    model = checks.config.model
    across = shape["expert"]
    tensor = shape["tensor"]
    context = shape["context"]
    if not has_experts(model):
        return

    checks.need(
        model.experts % across == 0,
        "model.experts",
        f"must be divisible by config.mesh.expert = {across}; "
        f"lower that to {math.gcd(model.experts, across)}",
    )
    checks.need(
        model.expert_mlp % tensor == 0,
        "model.expert_mlp",
        f"must be divisible by config.mesh.tensor = {tensor}; "
        f"lower that to {math.gcd(model.expert_mlp, tensor)}",
    )
    if checks.config.compute.expert_matmul == "grouped":
        for field, width in (("embed", model.embed), ("expert_mlp", model.expert_mlp // tensor)):
            checks.need(
                width % GROUPED_WIDTH == 0,
                f"model.{field}",
                f"leaves a device {width} channels, and config.compute.expert_matmul = 'grouped' "
                f"needs a multiple of {GROUPED_WIDTH}; change it, or use blocks",
            )
    checks.need(
        model.dispatch != "capacity" or context == 1,
        "model.dispatch",
        f"counts an expert's tokens over whole rows, and config.mesh.context = {context} "
        "cuts them; use dropless",
    )


# Sections and names of the fields that drop something.
DROPOUTS = (("model", "dropout"), ("model", "attention_dropout"), ("lora", "dropout"))


def _check_stages(checks: Checks, shape: dict) -> None:
    """Layers, microbatches and dropout over pipeline stages."""
    config = checks.config
    stages = shape["pipeline"]
    if stages == 1:
        for name in ("pipeline_rounds", "pipeline_microbatches"):
            checks.need(
                getattr(config.compute, name) == getattr(type(config.compute), name),
                f"compute.{name}",
                "does nothing without config.mesh.pipeline; set that too, or leave it out",
            )
        return

    _check_stage_layers(checks, stages)
    rows = math.prod(shape[axis] for axis in BATCH_AXES) // stages
    _check_stage_rows(checks, stages, rows)
    for section, name in DROPOUTS:
        checks.need(
            not getattr(getattr(config, section), name),
            f"{section}.{name}",
            f"with config.mesh.pipeline = {stages} would differ from other meshes; set 0",
        )


def _check_stage_layers(checks: Checks, stages: int) -> None:
    """Every stage has the same number of repeats of the layer pattern in every round."""
    model = checks.config.model
    plan = layout(layer_specs(model))
    period = len(plan.period)
    rounds = checks.config.compute.pipeline_rounds
    parts = stages * rounds
    # Rounds do nothing without a pipeline, so one stage is no way out for them.
    fewer = [
        size
        for size in range(1 if rounds == 1 else 2, stages)
        if stages % size == 0 and plan.repeats % (size * rounds) == 0
    ]
    other = f"config.mesh.pipeline={fewer[-1]}" if fewer else "config.compute.pipeline_rounds=1"

    checks.need(
        stages <= model.layers,
        "model.layers",
        f"is less than config.mesh.pipeline = {stages} stages; lower config.mesh.pipeline",
    )
    repeated = "1 layer" if period == 1 else f"{period} layers"
    checks.need(
        plan.repeats % parts == 0,
        "model.layers",
        f"gives {plan.repeats} repeats of {repeated}, which must be divisible by "
        f"config.mesh.pipeline x config.compute.pipeline_rounds = {parts}; "
        f"try {round_up(plan.repeats, parts) * period} layers "
        f"or {other}",
    )


def _check_stage_rows(checks: Checks, stages: int, rows: int) -> None:
    """A batch is cut into microbatches of `rows` devices' rows each."""
    config = checks.config
    count = config.compute.pipeline_microbatches or stages
    together = count * rows

    checks.need(
        count >= stages,
        "compute.pipeline_microbatches",
        f"is less than config.mesh.pipeline = {stages}; set that or more, or 0 for as many",
    )
    sizes = [
        (
            level.path,
            level.train.batch_size // level.train.accumulate,
            level.at_length,
            level.if_past,
        )
        for level in _name_levels(checks)
    ]
    sizes.append(("eval.batch_size", config.eval.batch_size, "", ""))
    for path, size, at_length, if_past in sizes:
        checks.need(
            size % together == 0,
            path,
            f"gives {size} rows at a time, which must be divisible by "
            f"pipeline_microbatches x data x fsdp x expert = {count} x {rows} for the pipeline"
            f"{at_length}; "
            f"set config.compute.pipeline_microbatches or try {round_up(size, together)} rows"
            f"{if_past}",
        )


def _check_copies(checks: Checks, shape: dict) -> None:
    """Devices that sum their gradients once an update have all weights whole."""
    config = checks.config
    if not config.train.reduce_once:
        return

    allowed = (*COPY_AXES, "tensor")
    others = [axis for axis, size in shape.items() if size > 1 and axis not in allowed]
    way_out = "set false, or those axes to 1"
    if not others and config.mesh.zero != 1 and shape["fsdp"] > 1:
        others = ["fsdp"]
        way_out = "set config.mesh.zero=1, or false"
    named = " and ".join(f"config.mesh.{axis} = {shape[axis]}" for axis in others)
    checks.need(
        not others,
        "train.reduce_once",
        f"needs all weights on every device, cut over tensor alone, and the mesh has {named}; "
        f"{way_out}",
    )

    copies = math.prod(shape[axis] for axis in COPY_AXES)
    checks.need(
        copies == 1 or config.compute.matmul_dtype != "fp8",
        "compute.matmul_dtype",
        f"takes scales over the whole mesh, and with config.train.reduce_once {copies} copies of "
        "the weights work apart; set compute, or config.train.reduce_once=false",
    )
    for section, name in DROPOUTS:
        checks.need(
            copies == 1 or not getattr(getattr(config, section), name),
            f"{section}.{name}",
            f"with config.train.reduce_once would be the same on {copies} copies of the weights; "
            "set 0, or config.train.reduce_once=false",
        )
