"""How the keys of a foreign `config.json` become fields of our Model, and back.

A `Key` is one fact: the keys it reads, the fields they decide, and the reverse. A family is a
tuple of them (families.py). A key that no fact of the family reads, and that is not among
MEANINGLESS, is refused, because it may change what the weights mean.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt_jax import config
from gpt_jax.config import layer_specs
from gpt_jax.errors import UsageError

# Keys that do not change what a trained model computes: names, training and generation settings.
MEANINGLESS = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_from_model_config",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "bos_token_id",
        "classifier_dropout",
        "classifier_dropout_prob",
        "cross_attention_hidden_size",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "model_type",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_index",
        "use_cache",
    ]
)


MOST_LAYERS = config.Model.__dataclass_fields__["layers"].metadata["high"]


class Missing:
    """In the place of a default: the config must have the key."""


class Key(NamedTuple):
    """One fact of a config. `read` may raise UsageError for a value that we do not have."""

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[config.Model], dict[str, Any]]


def take(values: Mapping[str, Any], name: str, default: Any = Missing) -> Any:
    """A value, or its default. Raises UsageError for one that is missing and has none."""
    value = values.get(name)
    if value is not None:
        return value
    if default is Missing:
        raise UsageError(f"config.json: {name} is missing, and the model cannot be made without it")
    return default


def take_switch(values: Mapping[str, Any], name: str) -> bool:
    """A value that is true or false, or false where there is none. Raises UsageError for others."""
    value = values.get(name) or False
    if not isinstance(value, bool):
        raise UsageError(f"config.json: {name} = {value!r} is neither true nor false")
    return value


def count_layers(values: Mapping[str, Any]) -> int:
    """The number of layers. It is checked before something is made of that length."""
    layers = take(values, "num_hidden_layers")
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise UsageError(
            f"config.json: num_hidden_layers = {layers!r}; expected 1 to {MOST_LAYERS:,}"
        )
    return layers


def field(name: str, ours: str, default: Any = Missing) -> Key:
    """A key that is one of our fields under another name."""

    def read(values):
        value = take(values, name, default)
        return {} if value is None else {ours: value}

    return Key((name,), read, lambda model: {name: getattr(model, ours)})


def must(name: str, *allowed: Any) -> Key:
    """A key of which we have these values alone. The first is the one that is left out."""

    def read(values):
        value = values.get(name, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UsageError(f"config.json: {name} = {value!r} is not supported; {wanted} is")
        return {}

    return Key((name,), read, lambda model: {})


def choice(name: str, rows: Mapping[Any, dict[str, Any]], default: Any = Missing) -> Key:
    """A key whose values stand for some of our fields each."""

    def read(values):
        value = take(values, name, default)
        if value not in rows:
            known = ", ".join(repr(known) for known in rows)
            raise UsageError(f"config.json: {name} = {value!r} is not supported; known: {known}")
        return rows[value]

    def write(model):
        for value, fields in rows.items():
            if all(getattr(model, ours) == wanted for ours, wanted in fields.items()):
                return {name: value}
        raise UsageError(f"no value of {name} stands for this model")

    return Key((name,), read, write)


# ---- feed-forwards ----

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def activation(name: str, rows: Mapping[str, str], default: Any = Missing) -> Key:
    """The activation of a dense feed-forward in all layers."""
    patterns = {theirs: {"pattern": (("attention", ours),)} for theirs, ours in rows.items()}
    return choice(name, patterns, default)


# ---- windows ----


def _read_layer_windows(values):
    """Windows by layer, from `layer_types` or the older keys of Qwen and Gemma."""
    layers = count_layers(values)
    size = values.get("sliding_window") or 0
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = _guess_layer_types(values, layers)
    if len(kinds) != layers:
        raise UsageError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    sizes = {"full_attention": 0, "sliding_attention": size}
    unknown = sorted(set(kinds) - set(sizes))
    if unknown:
        raise UsageError(
            f"config.json: layer_types has {', '.join(unknown)}; known: {', '.join(sizes)}"
        )
    return {"windows": shorten(tuple(sizes[kind] for kind in kinds))}


def _guess_layer_types(values, layers):
    """What files without `layer_types` mean: the rules that transformers has for them."""
    local, full = "sliding_attention", "full_attention"
    if not values.get("sliding_window"):
        return [full] * layers
    family = values["model_type"]
    if family.startswith("gemma"):
        every = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern")
        every = every or {"gemma2": 2}.get(family, 6)
        return [full if (i + 1) % every == 0 else local for i in range(layers)]
    if family.startswith("qwen"):
        first = values.get("max_window_layers", 28)
        return [local if i >= first else full for i in range(layers)]
    return [local] * layers


def shorten(entries: tuple) -> tuple:
    """The shortest tuple that gives `entries` when it is tiled over their length."""
    for length in range(1, len(entries) + 1):
        if all(entries[i] == entries[i % length] for i in range(len(entries))):
            return entries[:length]
    return entries


def _write_layer_windows(model):
    sizes = [spec.window for spec in layer_specs(model)]
    widths = set(sizes) - {0}
    if len(widths) > 1:
        raise UsageError(f"config.model.windows = {model.windows}: this family has one width")
    size = widths.pop() if widths else None
    kinds = ["sliding_attention" if window else "full_attention" for window in sizes]
    return {"sliding_window": size, "layer_types": kinds}


LAYER_WINDOWS = Key(
    (
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    ),
    _read_layer_windows,
    _write_layer_windows,
)


def _read_switched_windows(values):
    """Qwen: without its switch no layer has a window, whatever the other keys say."""
    is_on = take_switch(values, "use_sliding_window")
    return _read_layer_windows(values if is_on else {**values, "sliding_window": None})


def _add_switch(keys):
    return {**keys, "use_sliding_window": keys["sliding_window"] is not None}


SWITCHED_WINDOWS = Key(
    (*LAYER_WINDOWS.names, "use_sliding_window"),
    _read_switched_windows,
    lambda model: _add_switch(_write_layer_windows(model)),
)


def _write_one_window(model):
    sizes = {spec.window for spec in layer_specs(model)}
    if len(sizes) > 1:
        raise UsageError(
            f"config.model.windows = {model.windows}: this family has one for all layers"
        )
    return {"sliding_window": sizes.pop() or None}


ONE_WINDOW = Key(
    ("sliding_window",),
    lambda values: {"windows": (values.get("sliding_window") or 0,)},
    _write_one_window,
)


def _read_switched_window(values):
    """Qwen3-MoE: one window for all layers, if a switch is on."""
    is_on = take_switch(values, "use_sliding_window")
    return {"windows": (values.get("sliding_window") or 0 if is_on else 0,)}


SWITCHED_WINDOW = Key(
    ("sliding_window", "use_sliding_window"),
    _read_switched_window,
    lambda model: _add_switch(_write_one_window(model)),
)

# ---- rotary positions ----


def _read_scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields for the scaling of rotary frequencies."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_scale_factor": float(take(rope, "factor"))}
    if kind == "llama3":
        return {
            "rope_scaling": "llama3",
            "rope_scale_factor": float(take(rope, "factor")),
            "rope_scale_low": float(take(rope, "low_freq_factor")),
            "rope_scale_high": float(take(rope, "high_freq_factor")),
            "rope_scale_original_seq": int(take(rope, "original_max_position_embeddings")),
        }
    raise UsageError(
        f"config.json: {where} of type {kind!r} is not supported; known: default, linear, llama3"
    )


def _write_scaling(model: config.Model) -> dict[str, Any] | None:
    if model.rope_scale_factor == 1:
        return None
    if model.rope_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rope_scale_factor}
    return {
        "rope_type": "llama3",
        "factor": model.rope_scale_factor,
        "low_freq_factor": model.rope_scale_low,
        "high_freq_factor": model.rope_scale_high,
        "original_max_position_embeddings": model.rope_scale_original_seq,
    }


def _refuse_two_scalings(values):
    if values.get("rope_parameters") and values.get("rope_scaling"):
        raise UsageError(
            "config.json: has rope_parameters and rope_scaling; leave out the one that is not meant"
        )


def _read_rope(values):
    """Rotary positions, from `rope_parameters` (transformers 5) or the two keys before it."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    _refuse_two_scalings(values)
    base = rope.get("rope_theta") or values.get("rope_theta") or values.get("rotary_emb_base")
    part = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    part = part or values.get("rotary_pct") or 1.0
    fields = {
        "position": "rotary",
        "rope_base": float(base or 10_000),
        "rope_fraction": float(part),
    }
    return fields | _read_scaling(rope, "rope_parameters")


def _write_rope(model):
    """The older keys, which every version of transformers reads."""
    keys: dict[str, Any] = {"rope_theta": model.rope_base, "rope_scaling": _write_scaling(model)}
    if model.rope_fraction != 1:
        keys["partial_rotary_factor"] = model.rope_fraction
    return keys


ROPE = Key(
    (
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rotary_pct",
    ),
    _read_rope,
    _write_rope,
)


def _read_two_ropes(values):
    """Gemma 3: layers with a window rotate by a base of their own."""
    by_kind = values.get("rope_parameters")
    _refuse_two_scalings(values)
    if by_kind:
        full = take(by_kind, "full_attention")
        local = take(by_kind, "sliding_attention")
    else:
        full = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
        local = {"rope_theta": values.get("rope_local_base_freq")}
    if _read_scaling(local, "sliding_attention of rope_parameters"):
        raise UsageError("config.json: layers with a window have scaled frequencies; ours have not")
    fields = {
        "position": "rotary",
        "rope_base": float(full.get("rope_theta") or 1_000_000),
        "rope_local_base": float(local.get("rope_theta") or 10_000),
    }
    return fields | _read_scaling(full, "rope_parameters")


def _write_two_ropes(model):
    return {
        "rope_theta": model.rope_base,
        "rope_local_base_freq": model.rope_local_base or model.rope_base,
        "rope_scaling": _write_scaling(model),
    }


TWO_ROPES = Key(
    ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"),
    _read_two_ropes,
    _write_two_ropes,
)
