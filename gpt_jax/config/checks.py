"""What is derived from other knobs, and what must agree across them before anything compiles."""

import dataclasses
import math
from collections.abc import Callable

from gpt_jax.config.fields import Config
from gpt_jax.config.knobs import ENDLESS, FFNS, MIXERS
from gpt_jax.config.layers import layer_specs, layout
from gpt_jax.config.meshes import BATCH_AXES, FSDP_AXES, mesh_shape
from gpt_jax.config.run_fields import Optim
from gpt_jax.errors import UsageError


def resolve(config: Config, vocab: int = 0) -> Config:
    """Fills in what 0 leaves to be derived; `vocab` is the tokenizer's size (0: not known yet)."""
    model, train = config.model, config.train
    multiple = model.vocab_multiple
    filled = dataclasses.replace(
        model,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim
        or (0 if model.embed % model.heads else model.embed // model.heads),  # 0: check refuses
        mlp=model.mlp or 4 * model.embed,
        expert_mlp=model.expert_mlp or model.mlp or 4 * model.embed,
        max_seq=model.max_seq or train.seq_len,
        vocab=model.vocab or -(-vocab // multiple) * multiple,
    )
    return dataclasses.replace(
        config,
        model=filled,
        optim=dataclasses.replace(
            config.optim, decay_steps=config.optim.decay_steps or max(1, train.steps)
        ),
        eval=dataclasses.replace(
            config.eval, batch_size=config.eval.batch_size or train.batch_size
        ),
    )


def wsd_start(optim: Optim) -> int:
    """The step at which the schedule wsd begins to decay."""
    return optim.decay_steps - round(optim.decay_fraction * optim.decay_steps)


def check(config: Config, devices: int = 1, tokenizer_vocab: int = 0) -> dict[str, int]:
    """Everything that must agree across fields of a resolved config; returns the mesh's axis sizes.

    Raises UsageError with a line for each disagreement: field, value and way out."""
    shape = shape_on(config, devices, tokenizer_vocab)
    if found := problems(config, shape, tokenizer_vocab):
        raise UsageError("\n".join(found))
    return shape


def shape_on(config: Config, devices: int, tokenizer_vocab: int = 0) -> dict[str, int]:
    """Sizes of the mesh's axes for so many devices. UsageError, with the nearest meshes on which
    a resolved config runs, where they do not multiply."""

    def runs(mesh):
        return not problems(
            dataclasses.replace(config, mesh=mesh), mesh_shape(mesh, devices), tokenizer_vocab
        )

    return mesh_shape(config.mesh, devices, runs)


def _needing(config: Config) -> tuple[list[str], Callable]:
    """(lines, need): `need(ok, path, way_out)` adds a line about the field at `path` where `ok`
    is false."""
    found = []

    def need(ok, path, way_out):
        if not ok:
            value = config
            for part in path.split("."):
                value = getattr(value, part)
            found.append(f"config.{path} = {value!r}: {way_out}")

    return found, need


def problems(config: Config, shape: dict[str, int], tokenizer_vocab: int = 0) -> list[str]:
    """All disagreements on a mesh of these axis sizes, a line each. A model that is none ends
    the list: the rest would be about layers that it does not have."""
    found, need = _needing(config)
    if config.model.pattern and config.model.windows:
        for checked in (_check_split, _check_sequence, _check_experts, _check_stages):
            checked(need, config, shape)
    return [*faults(config, tokenizer_vocab), *found]


def faults(config: Config, tokenizer_vocab: int = 0) -> list[str]:
    """All disagreements that are there on every mesh, a line each; a config without any has a
    model that can be traced."""
    model, train, optim = config.model, config.train, config.optim
    found, need = _needing(config)
    need(
        model.head_dim > 0,
        "model.heads",
        f"does not divide config.model.embed = {model.embed}; choose a divisor or set "
        "config.model.head_dim",
    )
    need(
        model.heads % model.kv_heads == 0,
        "model.kv_heads",
        f"must divide config.model.heads = {model.heads}",
    )
    need(
        int(model.head_dim * model.rope_fraction) % 2 == 0 or model.position != "rotary",
        "model.rope_fraction",
        f"rotates an odd number of the {model.head_dim} channels of a head; choose an even part",
    )
    need(
        model.rope_scale_low < model.rope_scale_high,
        "model.rope_scale_high",
        f"must be above config.model.rope_scale_low = {model.rope_scale_low}",
    )
    need(
        model.max_seq >= train.seq_len,
        "model.max_seq",
        f"is shorter than config.train.seq_len = {train.seq_len}",
    )
    need(bool(model.pattern), "model.pattern", "needs at least one (mixer, feed-forward) pair")
    need(bool(model.windows), "model.windows", "needs at least one entry; 0 means no window")
    need(all(w >= 0 for w in model.windows), "model.windows", "entries must be 0 (all) or positive")
    for mixer, ffn in model.pattern:
        need(
            mixer in MIXERS,
            "model.pattern",
            f"unknown mixer {mixer!r}; choose from {', '.join(MIXERS)}",
        )
        need(
            ffn in FFNS,
            "model.pattern",
            f"unknown feed-forward {ffn!r}; choose from {', '.join(FFNS)}",
        )
    if not (model.pattern and model.windows):
        return found
    need(
        model.value_embed_gate <= model.embed or not model.value_embed,
        "model.value_embed_gate",
        f"is wider than config.model.embed = {model.embed}",
    )
    need(
        model.smear_gate <= model.embed or not model.smear,
        "model.smear_gate",
        f"is wider than config.model.embed = {model.embed}",
    )
    need(
        not optim.muon_momentum_final or optim.schedule == "wsd",
        "optim.muon_momentum_final",
        f"follows the decay of wsd, but config.optim.schedule = {optim.schedule!r}; use wsd, or 0",
    )
    if tokenizer_vocab:
        need(
            model.vocab >= tokenizer_vocab,
            "model.vocab",
            f"is smaller than the tokenizer's {tokenizer_vocab}; set 0 to follow the tokenizer",
        )
    need(
        config.data.eval_fraction or config.data.eval_path or not config.eval.compare_xz,
        "eval.compare_xz",
        "needs held-out text, and config.data.eval_fraction is 0",
    )
    need(
        not train.loss_chunk or train.seq_len % train.loss_chunk == 0,
        "train.loss_chunk",
        f"must divide config.train.seq_len = {train.seq_len}",
    )
    need(
        optim.warmup_steps <= optim.decay_steps or optim.schedule in ENDLESS,
        "optim.warmup_steps",
        f"is beyond the end of the schedule at step {optim.decay_steps}; lower it or set "
        "config.optim.decay_steps",
    )
    decay_from = wsd_start(optim)
    need(
        optim.schedule != "wsd" or optim.warmup_steps <= decay_from,
        "optim.decay_fraction",
        f"decay would start at step {decay_from}, before config.optim.warmup_steps = "
        f"{optim.warmup_steps} are over; "
        "lower one of them",
    )
    if any(ffn == "moe" for _, ffn in model.pattern):
        need(
            model.experts_per_token <= model.experts,
            "model.experts_per_token",
            f"is more than config.model.experts = {model.experts}",
        )
        need(
            model.dispatch != "capacity" or model.capacity_factor > 0,
            "model.capacity_factor",
            "leaves an expert no token; expected more than 0, as 1.25",
        )
    return found


def _check_split(need, config: Config, shape: dict) -> None:
    """Weights over tensor and the fsdp axes, rows over the axes of the batch."""
    model, train = config.model, config.train
    rows, split = (math.prod(shape[axis] for axis in axes) for axes in (BATCH_AXES, FSDP_AXES))
    tensor = math.gcd(shape["tensor"], model.heads, model.kv_heads, model.mlp)
    for path, size in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads),
        ("mlp", model.mlp),
        ("vocab", model.vocab),
    ):
        need(
            size % shape["tensor"] == 0,
            f"model.{path}",
            f"must be divisible by config.mesh.tensor = {shape['tensor']}; "
            + (
                f"set it to {-(-size // shape['tensor']) * shape['tensor']}, or to 0 and "
                "config.model.vocab_multiple to "
                f"{shape['tensor']}"
                if path == "vocab"
                else f"lower that to {tensor}"
            ),
        )
    need(
        model.embed % split == 0,
        "model.embed",
        f"must be divisible by fsdp x expert x context = {split} of the mesh",
    )
    values = (
        model.kv_heads * model.head_dim
    )  # width of the value embeddings' table, cut over fsdp like the embedding's
    need(
        not model.value_embed or values % split == 0,
        "model.kv_heads",
        f"times config.model.head_dim = {model.head_dim} must be divisible by fsdp x expert x "
        f"context = {split} of the mesh "
        "(value_embed)",
    )
    micro, most = (
        train.batch_size // train.accumulate,
        math.gcd(train.batch_size // rows, train.accumulate),
    )
    need(
        train.batch_size % train.accumulate == 0,
        "train.batch_size",
        f"must be divisible by config.train.accumulate = {train.accumulate}",
    )
    need(
        micro % rows == 0,
        "train.batch_size",
        f"gives {micro} rows a microbatch, which must be divisible by pipeline x data x fsdp x "
        f"expert = {rows} of the mesh; "
        f"try {-(-train.batch_size // (rows * train.accumulate)) * rows * train.accumulate}"
        + f", or config.train.accumulate={most}"
        * (train.batch_size % rows == 0),
    )
    need(
        config.eval.batch_size % rows == 0,
        "eval.batch_size",
        f"must be divisible by pipeline x data x fsdp x expert = {rows} of the mesh",
    )


def _check_sequence(need, config: Config, shape: dict) -> None:
    """The sequence over context and, between matmuls, tensor."""
    model, train, pieces, tensor = config.model, config.train, shape["context"], shape["tensor"]
    need(
        pieces == 1 or train.seq_len % (2 * pieces) == 0,
        "train.seq_len",
        f"must be divisible by 2 x config.mesh.context = {2 * pieces}; try "
        f"{-(-train.seq_len // (2 * pieces)) * 2 * pieces}",
    )
    need(
        pieces == 1 or not train.loss_chunk or train.loss_chunk % pieces == 0,
        "train.loss_chunk",
        f"must be divisible by config.mesh.context = {pieces}",
    )
    need(
        pieces == 1 or not model.attention_dropout,
        "model.attention_dropout",
        f"is not possible with config.mesh.context = {pieces}: no device has a whole map; set 0",
    )
    need(
        not config.compute.shard_sequence or train.seq_len % (pieces * tensor) == 0,
        "train.seq_len",
        f"must be divisible by context x tensor = {pieces * tensor} of the mesh "
        "(config.compute.shard_sequence)",
    )


def _check_experts(need, config: Config, shape: dict) -> None:
    """The mixture of experts, where the pattern has one."""
    model, across, tensor = config.model, shape["expert"], shape["tensor"]
    if all(ffn != "moe" for _, ffn in model.pattern):
        return
    need(
        model.experts % across == 0,
        "model.experts",
        f"must be divisible by config.mesh.expert = {across}; lower that to "
        f"{math.gcd(model.experts, across)}",
    )
    need(
        model.expert_mlp % tensor == 0,
        "model.expert_mlp",
        f"must be divisible by config.mesh.tensor = {tensor}; lower that to "
        f"{math.gcd(model.expert_mlp, tensor)}",
    )
    need(
        model.dispatch != "capacity" or shape["context"] == 1,
        "model.dispatch",
        f"counts an expert's tokens over whole rows, and config.mesh.context = {shape['context']} "
        "cuts them; use dropless",
    )


def _check_stages(need, config: Config, shape: dict) -> None:
    """Layers over pipeline stages."""
    model, train, stages = config.model, config.train, shape["pipeline"]
    if stages == 1:
        for path in ("pipeline_rounds", "pipeline_microbatches"):
            need(
                getattr(config.compute, path) == getattr(type(config.compute), path),
                f"compute.{path}",
                "does nothing without config.mesh.pipeline; set that too, or leave it out",
            )
        return
    plan, parts = layout(layer_specs(model)), stages * config.compute.pipeline_rounds
    repeats, period = plan.repeats, len(plan.period)
    need(
        stages <= model.layers,
        "model.layers",
        f"is less than config.mesh.pipeline = {stages} stages; lower config.mesh.pipeline",
    )
    need(
        repeats % parts == 0,
        "model.layers",
        f"gives {repeats} repeats of {period} layer{'s' * (period > 1)}, which must be divisible "
        "by config.mesh.pipeline x "
        f"config.compute.pipeline_rounds = {parts}; try {-(-repeats // parts) * parts * period} "
        "layers or "
        f"config.mesh.pipeline={math.gcd(repeats, stages)}",
    )
    count, rows = (
        config.compute.pipeline_microbatches or stages,
        math.prod(shape[axis] for axis in BATCH_AXES) // stages,
    )
    need(
        count >= stages,
        "compute.pipeline_microbatches",
        f"is less than config.mesh.pipeline = {stages}; set that or more, or 0 for as many",
    )
    together = count * rows
    for path, size in (
        ("train.batch_size", train.batch_size // train.accumulate),
        ("eval.batch_size", config.eval.batch_size),
    ):
        need(
            size % together == 0,
            path,
            f"gives {size} rows at a time, which must be divisible by pipeline_microbatches x data "
            f"x fsdp x expert = {count} "
            f"x {rows} for the pipeline; set config.compute.pipeline_microbatches or try "
            f"{-(-size // together) * together} rows",
        )
    for path in ("dropout", "attention_dropout"):
        need(
            not getattr(model, path),
            f"model.{path}",
            f"with config.mesh.pipeline = {stages} would differ from other meshes; set 0",
        )
