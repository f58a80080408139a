"""What is derived from other knobs, and what must agree across them before anything compiles."""

import dataclasses
import math

from gpt_jax.config.fields import ENDLESS, FFNS, MIXERS, Config, Mesh, Optim
from gpt_jax.errors import UsageError


def resolve(config: Config, vocab: int = 0) -> Config:
    """Fills in what 0 leaves to be derived; `vocab` is the tokenizer's size (0: not known yet)."""
    model, train = config.model, config.train
    multiple = model.vocab_multiple
    filled = dataclasses.replace(
        model,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or (0 if model.embed % model.heads else model.embed // model.heads),  # 0: check refuses
        mlp=model.mlp or 4 * model.embed,
        max_seq=model.max_seq or train.seq_len,
        vocab=model.vocab or -(-vocab // multiple) * multiple)
    return dataclasses.replace(
        config, model=filled,
        optim=dataclasses.replace(config.optim, decay_steps=config.optim.decay_steps or max(1, train.steps)),
        eval=dataclasses.replace(config.eval, batch_size=config.eval.batch_size or train.batch_size))


def wsd_start(optim: Optim) -> int:
    """The step at which the schedule wsd begins to decay."""
    return optim.decay_steps - round(optim.decay_fraction * optim.decay_steps)


def mesh_shape(mesh: Mesh, devices: int) -> dict[str, int]:
    """Axis sizes in mesh order, with -1 filled in, for `devices` devices; UsageError when they do not multiply."""
    sizes = {f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh)}
    for axis, size in sizes.items():
        if size == 0:
            raise UsageError(f"config.mesh.{axis} = 0: expected a positive size, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UsageError(f"config.mesh.{free[1]} = -1: only one axis may be -1, and config.mesh.{free[0]} is")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if devices % fixed or (not free and fixed != devices):
        axes = ", ".join(f"config.mesh.{a} = {s}" for a, s in sizes.items() if s != 1) or "config.mesh.data = 1"
        raise UsageError(f"{axes}: {fixed} does not match {devices} devices; "
                         "set one axis to -1 or make the product equal")
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def check(config: Config, devices: int = 1, tokenizer_vocab: int = 0) -> dict[str, int]:
    """Everything that must agree across fields of a resolved config; returns the mesh's axis sizes.

    Raises UsageError for the first disagreement, naming field, value and way out."""
    model, train, optim = config.model, config.train, config.optim
    shape = mesh_shape(config.mesh, devices)
    rows = shape["data"] * shape["fsdp"]

    def need(ok, path, way_out):
        if not ok:
            value = config
            for part in path.split("."):
                value = getattr(value, part)
            raise UsageError(f"config.{path} = {value!r}: {way_out}")

    need(model.head_dim > 0, "model.heads",
         f"does not divide config.model.embed = {model.embed}; choose a divisor or set config.model.head_dim")
    need(model.heads % model.kv_heads == 0, "model.kv_heads", f"must divide config.model.heads = {model.heads}")
    need(int(model.head_dim * model.rope_fraction) % 2 == 0 or model.position != "rotary", "model.rope_fraction",
         f"rotates an odd number of the {model.head_dim} channels of a head; choose an even part")
    need(model.rope_scale_low < model.rope_scale_high, "model.rope_scale_high",
         f"must be above config.model.rope_scale_low = {model.rope_scale_low}")
    need(model.max_seq >= train.seq_len, "model.max_seq", f"is shorter than config.train.seq_len = {train.seq_len}")
    need(bool(model.pattern), "model.pattern", "needs at least one (mixer, feed-forward) pair")
    need(bool(model.windows), "model.windows", "needs at least one entry; 0 means no window")
    need(all(w >= 0 for w in model.windows), "model.windows", "entries must be 0 (all) or positive")
    for mixer, ffn in model.pattern:
        need(mixer in MIXERS, "model.pattern", f"unknown mixer {mixer!r}; choose from {', '.join(MIXERS)}")
        need(ffn in FFNS, "model.pattern", f"unknown feed-forward {ffn!r}; choose from {', '.join(FFNS)}")
    need(model.value_embed_gate <= model.embed or not model.value_embed, "model.value_embed_gate",
         f"is wider than config.model.embed = {model.embed}")
    need(model.smear_gate <= model.embed or not model.smear, "model.smear_gate",
         f"is wider than config.model.embed = {model.embed}")
    need(not optim.muon_momentum_final or optim.schedule == "wsd", "optim.muon_momentum_final",
         f"follows the decay of wsd, but config.optim.schedule = {optim.schedule!r}; use wsd, or 0")
    if tokenizer_vocab:
        need(model.vocab >= tokenizer_vocab, "model.vocab",
             f"is smaller than the tokenizer's {tokenizer_vocab}; set 0 to follow the tokenizer")
    for path, size in (("heads", model.heads), ("kv_heads", model.kv_heads), ("mlp", model.mlp),
                       ("vocab", model.vocab)):
        need(size % shape["tensor"] == 0, f"model.{path}",
             f"must divide by config.mesh.tensor = {shape['tensor']}"
             + ("; set config.model.vocab_multiple" if path == "vocab" else ""))
    need(model.embed % shape["fsdp"] == 0, "model.embed", f"must divide by config.mesh.fsdp = {shape['fsdp']}")
    values = model.kv_heads * model.head_dim  # width of the value embeddings' table, cut over fsdp like the embedding's
    need(not model.value_embed or values % shape["fsdp"] == 0, "model.kv_heads",
         f"times config.model.head_dim = {model.head_dim} must divide by config.mesh.fsdp = {shape['fsdp']} (value_embed)")
    micro = train.batch_size // train.accumulate
    need(train.batch_size % train.accumulate == 0, "train.batch_size",
         f"must divide by config.train.accumulate = {train.accumulate}")
    need(micro % rows == 0, "train.batch_size",
         f"gives {micro} rows a microbatch, which must divide by data x fsdp = {rows} of the mesh; "
         f"try {-(-train.batch_size // (rows * train.accumulate)) * rows * train.accumulate}")
    need(config.eval.batch_size % rows == 0, "eval.batch_size", f"must divide by data x fsdp = {rows} of the mesh")
    need(config.data.eval_fraction or config.data.eval_path or not config.eval.compare_xz, "eval.compare_xz",
         "needs held-out text, and config.data.eval_fraction is 0")
    need(not train.loss_chunk or train.seq_len % train.loss_chunk == 0, "train.loss_chunk",
         f"must divide config.train.seq_len = {train.seq_len}")
    need(optim.warmup_steps <= optim.decay_steps or optim.schedule in ENDLESS, "optim.warmup_steps",
         f"is beyond the end of the schedule at step {optim.decay_steps}; lower it or set config.optim.decay_steps")
    decay_from = wsd_start(optim)
    need(optim.schedule != "wsd" or optim.warmup_steps <= decay_from, "optim.decay_fraction",
         f"decay would start at step {decay_from}, before config.optim.warmup_steps = {optim.warmup_steps} are over; "
         "lower one of them")
    return shape
