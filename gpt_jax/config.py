"""The frozen `Config`: every knob of a run, its default and its limits (floor 0).

A config file returns a `ConfigDict` holding only what it changes; `from_dict` turns it into one `Config` and is the
last place that sees a ConfigDict. Each room receives its own section. Values that must agree with each other are
checked in `check`, before anything compiles. A knob whose value 0 means "derived" says so in its comment; `resolve`
fills it in.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Mapping

from gpt_jax.errors import UsageError


def knob(default, *, low=None, high=None, choices=None):
    """A dataclass field with limits: `low <= value <= high`, or one of `choices`."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


NORMS = ("layernorm", "rmsnorm", "plain_rmsnorm")
POSITIONS = ("learned", "rotary", "sinusoidal", "none")
MIXERS = ("attention",)
FFNS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu", "geglu")
KERNELS = ("auto", "reference", "blocked", "xla", "cudnn", "splash")
REMATS = ("none", "block", "dots", "offload")
INITS = ("gpt2", "xavier", "modern")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
ROWS = ("window", "chunk", "packed")
SPLITS = ("tail", "document")
OBJECTIVES = ("next_token",)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """The transformer, as data (read by gpt_jax/model)."""

    layers: int = knob(4, low=1)
    embed: int = knob(128, low=1)  # width of the residual stream
    heads: int = knob(4, low=1)  # query heads
    kv_heads: int = knob(0, low=0)  # key and value heads; 0: same as heads (1: multi-query)
    head_dim: int = knob(0, low=0)  # 0: embed / heads
    mlp: int = knob(0, low=0)  # hidden width of the feed-forward; 0: 4 * embed
    vocab: int = knob(0, low=0)  # rows of the embedding; 0: the tokenizer's size rounded up to vocab_multiple
    vocab_multiple: int = knob(1, low=1)  # 64 or 128 keeps the head's matmul aligned
    max_seq: int = knob(0, low=0)  # longest context (learned positions, KV cache); 0: train.seq_len
    pattern: tuple[tuple[str, str], ...] = (("attention", "gelu_tanh"),)  # (mixer, feed-forward), tiled over depth
    norm: str = knob("layernorm", choices=NORMS)
    norm_epsilon: float = knob(1e-5, low=0.0)
    norm_position: str = knob("pre", choices=("pre", "post"))
    embed_norm: bool = False  # normalise right after the embedding
    final_norm: bool = True  # normalise before the head
    position: str = knob("learned", choices=POSITIONS)
    rope_base: float = knob(10_000.0, low=1.0)
    rope_fraction: float = knob(1.0, low=0.0, high=1.0)  # part of head_dim that rotates
    rope_scale_factor: float = knob(1.0, low=1.0)  # Llama-3 frequency scaling; 1: off
    rope_scale_low: float = knob(1.0, low=0.0)  # wavelengths above original_seq / low are divided by the factor
    rope_scale_high: float = knob(4.0, low=0.0)  # wavelengths below original_seq / high stay
    rope_scale_original_seq: int = knob(8192, low=1)
    windows: tuple[int, ...] = (0,)  # keys a query may look at, itself included, tiled over depth; 0: all
    last_window_full: bool = False  # the last layer always sees everything
    qk_norm: bool = False
    qk_norm_after_rope: bool = False  # normalise after rotating (nanochat) instead of before (Qwen3)
    qk_scale: float = knob(1.0, low=0.0)  # extra factor on both q and k after their norm
    attention_softcap: float = knob(0.0, low=0.0)  # c * tanh(score / c); 0: off
    logit_softcap: float = knob(0.0, low=0.0)  # the same on the logits
    tied: bool = True  # the head is the embedding, transposed
    bias: bool = True  # biases on matmuls and LayerNorms
    qkv_bias: bool = True  # biases on q, k, v; needs bias (Qwen2: bias only here is a later row)
    dropout: float = knob(0.0, low=0.0, high=0.99)  # on the embedding and on every residual branch
    attention_dropout: float = knob(0.0, low=0.0, high=0.99)  # on attention probabilities (reference kernel only)
    value_embed: bool = False  # gated value embeddings on alternate layers, the last included
    value_embed_gate: int = knob(12, low=1)  # channels of the residual stream that drive the gate
    residual_scalars: bool = False  # x = r_i * x + a_i * x0, both learned
    init: str = knob("gpt2", choices=INITS)
    dtype: str = knob("float32", choices=DTYPES)  # of matmuls; parameters and sums stay float32
    kernel: str = knob("auto", choices=KERNELS)  # attention kernel; a named one runs or raises
    remat: str = knob("none", choices=REMATS)  # what the backward pass recomputes
    unroll: int = knob(1, low=0)  # layer periods per scan iteration; 0: all (same parameters, longer compile)


@dataclass(frozen=True)
class Data:
    """Where text comes from and how it becomes rows (read by gpt_jax/data)."""

    path: tuple[str, ...] = ()  # files, directories, globs, or the word stdlib (the Python standard library's source)
    eval_path: tuple[str, ...] = ()  # held-out text; empty: split off `path`
    eval_fraction: float = knob(0.1, low=0.0, high=0.9)
    split: str = knob("tail", choices=SPLITS)  # tail: the last part by position; document: by hash of the document
    field: str = "text"  # the text column of .jsonl and .parquet
    errors: str = knob("strict", choices=("strict", "replace"))  # undecodable UTF-8
    tokenizer: str = "bytes"  # bytes | char | bpe:VOCAB | a path to a tokenizer.json
    rows: str = knob("window", choices=ROWS)  # window: random windows; chunk: each token once an epoch; packed: the
    #                                           same with documents kept apart by segments and positions
    cache: str = "~/.cache/gpt_jax"  # token files, keyed by content and tokenizer
    workers: int = knob(0, low=0)  # tokenizing threads; 0: one a core
    prefetch: int = knob(4, low=1)  # batches ready ahead of the device


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one may be -1 and takes what is left (read by gpt_jax/sharding.py)."""

    data: int = knob(-1, low=-1)
    fsdp: int = knob(1, low=-1)
    tensor: int = knob(1, low=-1)
    context: int = knob(1, low=1, high=1)  # reserved
    expert: int = knob(1, low=1, high=1)  # reserved
    pipeline: int = knob(1, low=1, high=1)  # reserved


@dataclass(frozen=True)
class Group:
    """Parameters with an optimiser of their own. The first group whose `match` is found in the path takes it."""

    match: str = ".*"  # regular expression searched in paths such as blocks/0/attention/q/kernel
    optimizer: str = knob("adamw", choices=OPTIMIZERS)
    optional: bool = False  # may find no parameter (a part of the model that can be switched off); else that is an error
    rate: float = knob(1.0, low=0.0)  # factor on optim.learning_rate
    b1: float = knob(0.9, low=0.0, high=0.9999)  # momentum of sgd, muon and lion too
    b2: float = knob(0.95, low=0.0, high=0.99999)
    eps: float = knob(1e-8, low=0.0)
    weight_decay: float = knob(0.0, low=0.0)


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule (read by gpt_jax/train/optim.py)."""

    optimizer: str = knob("adamw", choices=OPTIMIZERS)  # of every parameter that no group takes
    learning_rate: float = knob(3e-4, low=0.0)
    b1: float = knob(0.9, low=0.0, high=0.9999)  # momentum of sgd, muon and lion too
    b2: float = knob(0.95, low=0.0, high=0.99999)
    eps: float = knob(1e-8, low=0.0)
    weight_decay: float = knob(0.1, low=0.0)
    decay: str = knob("matrices", choices=("matrices", "all"))  # matrices: not biases, norms and scalars
    clip: float = knob(1.0, low=0.0)  # global gradient norm; 0: off
    schedule: str = knob("cosine", choices=SCHEDULES)
    warmup_steps: int = knob(0, low=0)
    decay_steps: int = knob(0, low=0)  # the step at which the schedule ends; 0: train.steps
    decay_fraction: float = knob(0.2, low=0.0, high=1.0)  # wsd: the part of the run that decays
    final_fraction: float = knob(0.1, low=0.0, high=1.0)  # last rate over peak rate
    groups: tuple[Group, ...] = ()
    muon_iterations: int = knob(5, low=1)  # Newton-Schulz steps
    muon_momentum_warmup: int = knob(0, low=0)  # steps over which Muon's momentum rises from 0.85 to b1; 0: off
    muon_cautious: bool = False  # decay only where update and weight agree in sign
    muon_decay_to_zero: bool = False  # cosine of Muon's weight decay to zero at decay_steps
    muon_normalize: bool = False  # NorMuon: per-row second moment after orthogonalising (b2)


@dataclass(frozen=True)
class Train:
    """The loop (read by gpt_jax/experiment.py and gpt_jax/train)."""

    steps: int = knob(1000, low=0)
    batch_size: int = knob(8, low=1)  # rows a step, over all processes and microbatches
    seq_len: int = knob(256, low=1)  # tokens a row
    accumulate: int = knob(1, low=1)  # microbatches a step
    objective: str = knob("next_token", choices=OBJECTIVES)
    z_loss: float = knob(0.0, low=0.0)  # weight of log(Z)^2
    label_smoothing: float = knob(0.0, low=0.0, high=0.99)
    loss_chunk: int = knob(0, low=0)  # tokens of a row whose logits exist at once; 0: all
    ema: float = knob(0.0, low=0.0, high=0.999999)  # decay of averaged weights; 0: off
    hang_minutes: float = knob(30.0, low=0.0)  # exit 41 when no step ends for so long; 0: off


@dataclass(frozen=True)
class Eval:
    """Evaluation and samples during training (read by gpt_jax/evals.py)."""

    every_steps: int = knob(250, low=0)  # 0: only at the end
    batches: int = knob(0, low=0)  # held-out batches; 0: all of them
    batch_size: int = knob(0, low=0)  # 0: train.batch_size
    sample_every_steps: int = knob(0, low=0)  # 0: only at the end
    sample_prompts: tuple[str, ...] = ("\n",)
    sample_tokens: int = knob(100, low=1)
    sample_temperature: float = knob(0.8, low=0.0)
    sample_top_k: int = knob(0, low=0)
    compare_xz: bool = False  # also print what xz -9 makes of the held-out text


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep (read by gpt_jax/train/checkpoint.py)."""

    every_steps: int = knob(1000, low=0)  # 0: only at the end and on request
    every_minutes: float = knob(0.0, low=0.0)  # 0: off
    keep_last: int = knob(2, low=1)
    keep_every_steps: int = knob(0, low=0)  # multiples of this are kept for ever; 0: off
    keep_best: int = knob(0, low=0)  # how many of the best by best_metric; 0: off
    best_metric: str = "eval/loss"  # smaller is better


@dataclass(frozen=True)
class Log:
    """What is reported (read by gpt_jax/metrics.py)."""

    every_steps: int = knob(10, low=1)
    tensorboard: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Config:
    """One run. Sections are handed to the rooms of the same name."""

    seed: int = knob(0, low=0)
    model: Model = Model()
    data: Data = Data()
    mesh: Mesh = Mesh()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


# Sections and fields that may change when a run resumes: they alter neither the parameters' layout nor their meaning.
RESUMABLE = ("log", "eval", "checkpoint", "mesh", "train.steps", "train.hang_minutes", "train.accumulate",
             "train.loss_chunk", "data.cache", "data.workers", "data.prefetch", "model.kernel", "model.remat",
             "model.unroll", "optim.learning_rate", "optim.decay_steps")


def _describe(kind) -> str:
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _coerce(kind, value, path: str):
    """`value` as `kind`, or a UsageError naming `path`. Ints pass as floats, lists as tuples; nothing else bends."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(value, kind, path)
    if origin is tuple:
        if isinstance(value, str) and args == (str, Ellipsis):
            value = (value,)
        if not isinstance(value, (tuple, list)):
            raise UsageError(f"{path} = {value!r}: expected a tuple, such as (a, b)")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UsageError(f"{path} = {value!r}: expected {len(kinds)} entries")
        return tuple(_coerce(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{path} = {value!r}: expected {_describe(kind)}, got {_describe(type(value))}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{path} = {value!r}: expected a finite number")
    return value


def _limits(spec: dataclasses.Field, value, path: str) -> None:
    low, high, choices = (spec.metadata.get(k) for k in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        raise UsageError(f"{path} = {value!r}: choose one of {', '.join(choices)}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} (reserved)" if low == high else f"from {low} to {high}"
        raise UsageError(f"{path} = {value!r}: expected {bounds}")


def from_dict(values: Mapping[str, Any], kind=Config, path: str = "config"):
    """A frozen `kind` from nested mappings (a ConfigDict too). Unknown keys, wrong types and values out of range raise
    UsageError with the field, the value and the way out."""
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UsageError(f"{path} = {values!r}: expected a section with named fields")
    specs, hints = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in specs:
            near = difflib.get_close_matches(name, specs, 1, 0.5)
            hint = f"did you mean {path}.{near[0]}?" if near else f"known keys: {', '.join(specs)}"
            raise UsageError(f"{path}.{name} = {value!r}: unknown key; {hint}")
        made[name] = _coerce(hints[name], value, f"{path}.{name}")
        _limits(specs[name], made[name], f"{path}.{name}")
    return kind(**made)


def to_dict(config) -> dict:
    """Nested plain dicts; tuples become lists, as JSON reads them back."""
    return json.loads(to_json(config))


def to_json(config) -> str:
    """The whole config as JSON, defaults included; `from_dict(json.loads(text))` gives the same Config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def flatten(config) -> dict[str, Any]:
    """`{"model.layers": 4, …}`; groups and other tuples stay whole."""
    out = {}
    for name, value in to_dict(config).items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


def changes(old, new) -> list[tuple[str, Any, Any, bool]]:
    """(key, old value, new value, may resume) for every field that differs between two Configs."""
    before, after = flatten(old), flatten(new)
    return [(key, before[key], after[key], key in RESUMABLE or key.split(".")[0] in RESUMABLE)
            for key in after if before[key] != after[key]]


def override(values: dict, key: str, text: str) -> None:
    """Sets `section.field` of nested dict `values` from command-line text, parsed by the field's type."""
    *sections, name = key.split(".")
    kind, path = Config, "config"
    for section in [*sections, name]:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if section not in hints:
            near = difflib.get_close_matches(section, hints, 1, 0.5)
            known = f"did you mean {path}.{near[0]}?" if near else f"known keys: {', '.join(hints) or 'none'}"
            raise UsageError(f"{path}.{section} = {text!r}: unknown key; {known}")
        kind, path = hints[section], f"{path}.{section}"
    if dataclasses.is_dataclass(kind):
        raise UsageError(f"{path} = {text!r}: is a section; set one of its fields: "
                         f"{', '.join(typing.get_type_hints(kind))}")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = parse(kind, text, path)


def parse(kind, text: str, path: str):
    """Command-line text as a value of type `kind`: numbers with underscores, true/false, `a,b` or a Python tuple."""
    import ast

    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            value = float(text) if "e" in text.lower() else int(text)  # 1e6 steps is a whole number too
            if value != int(value):
                raise ValueError
            return int(value)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        if isinstance(kind, types.GenericAlias) and typing.get_args(kind)[0] is str and not text.startswith("("):
            return tuple(part for part in text.split(",") if part)
        value = ast.literal_eval(text)
        return value if isinstance(value, tuple) else (value,)
    except (ValueError, KeyError, SyntaxError, OverflowError):
        raise UsageError(f"{path} = {text!r}: expected {_describe(kind)}") from None


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
    if tokenizer_vocab:
        need(model.vocab >= tokenizer_vocab, "model.vocab",
             f"is smaller than the tokenizer's {tokenizer_vocab}; set 0 to follow the tokenizer")
    for path, size in (("heads", model.heads), ("kv_heads", model.kv_heads), ("mlp", model.mlp),
                       ("vocab", model.vocab)):
        need(size % shape["tensor"] == 0, f"model.{path}",
             f"must divide by config.mesh.tensor = {shape['tensor']}"
             + ("; set config.model.vocab_multiple" if path == "vocab" else ""))
    need(model.embed % shape["fsdp"] == 0, "model.embed", f"must divide by config.mesh.fsdp = {shape['fsdp']}")
    micro = train.batch_size // train.accumulate
    need(train.batch_size % train.accumulate == 0, "train.batch_size",
         f"must divide by config.train.accumulate = {train.accumulate}")
    need(micro % rows == 0, "train.batch_size",
         f"gives {micro} rows a microbatch, which must divide by data x fsdp = {rows} of the mesh; "
         f"try {-(-train.batch_size // (rows * train.accumulate)) * rows * train.accumulate}")
    need(config.eval.batch_size % rows == 0, "eval.batch_size", f"must divide by data x fsdp = {rows} of the mesh")
    need(not train.loss_chunk or train.seq_len % train.loss_chunk == 0, "train.loss_chunk",
         f"must divide config.train.seq_len = {train.seq_len}")
    need(optim.warmup_steps <= optim.decay_steps, "optim.warmup_steps",
         f"is beyond the end of the schedule at step {optim.decay_steps}; lower it or set config.optim.decay_steps")
    return shape
