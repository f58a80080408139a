"""The model that a foreign `config.json` describes, and the `config.json` of one of ours."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.interop.families import FAMILIES, Family, find_family
from gpt_jax.interop.keys import MEANINGLESS

# Fields that say how a model is trained, and not what its weights mean.
TRAINING = frozenset(
    [
        "attention_dropout",
        "balance",
        "balance_rate",
        "balance_weight",
        "capacity_factor",
        "dispatch",
        "dropout",
        "init",
        "router_z_loss",
        "vocab_multiple",
        "value_embed_gate",
        "smear_gate",
    ]
)


def read_model(values: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> configs.Model:
    """The resolved model of a `config.json`.

    Raises UsageError with a line for each key that is missing, unknown, or of a value that we do
    not have. Keys in `ignored` may have any value.
    """
    family = find_family(values.get("model_type"))
    lines = [
        f"config.json: {name} = {values[name]!r} is not understood and may change the model; "
        f"if it does not, --ignore_keys={name}"
        for name in find_unknown(values, family, ignored)
    ]
    found, faults = read_fields(values, family)
    if lines or faults:
        raise UsageError(*lines, *faults)
    return resolve_model(found)


def read_fields(values: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """Our fields that the keys of a `config.json` decide, and a line for each fault of a key."""
    values = {**family.defaults, **values}
    found = dict(family.fixed)
    lines = []
    for key in family.keys:
        try:
            found |= key.read(values)
        except UsageError as error:
            lines += error.args
        except (TypeError, ValueError, AttributeError):
            lines.append(f"config.json: {' or '.join(key.names)}: a value of another type")
    return found, lines


def find_unknown(
    values: Mapping[str, Any], family: Family, ignored: tuple[str, ...]
) -> tuple[str, ...]:
    """The keys with a value that a family does not understand, and that are not in `ignored`."""
    known = MEANINGLESS | {name for key in family.keys for name in key.names} | set(ignored)
    return tuple(name for name, value in values.items() if name not in known and value is not None)


def resolve_model(found: Mapping[str, Any]) -> configs.Model:
    """The Model of these fields, its zeros filled in. Raises UsageError for what does not fit."""
    wanted = {"model": dict(found), "train": {"seq_len": 2}}
    run = configs.resolve(configs.from_dict(wanted))
    lines = configs.faults(run)
    if lines:
        raise UsageError(*lines)
    return run.model


def write_config(model: configs.Model, name: str = "") -> dict[str, Any]:
    """The `config.json` of a resolved model, in the family `name` or in the first that fits.

    Raises UsageError if none does, with the fields that the nearest one cannot say.
    """
    if name and not find_family(name).is_written:
        raise UsageError(f"models of the family {name} can only be read; name another")
    families = [find_family(name)] if name else list(FAMILIES.values())
    families = [family for family in families if family.is_written]
    faults = {}
    for family in families:
        values, faults[family.name] = _write_as(family, model)
        if not faults[family.name]:
            return values
    nearest = min(faults, key=lambda name: len(faults[name]))
    first = f"no family of models fits this one; nearest is {nearest}, which cannot say:"
    if name:
        first = f"the family {name} does not fit this model; it cannot say:"
    raise UsageError(first, *(f"  {line}" for line in faults[nearest]))


def _write_as(family: Family, model: configs.Model) -> tuple[dict[str, Any], list[str]]:
    """The `config.json` of a model in a family, and a line for each thing it cannot say."""
    values: dict[str, Any] = {"model_type": family.name, "architectures": [family.architecture]}
    lines = []
    for key in family.keys:
        try:
            values |= key.write(model)
        except UsageError as error:
            lines += error.args

    try:
        found = find_meaning(resolve_model(read_fields(values, family)[0]))
    except UsageError as error:
        return values, [*lines, *error.args]
    lines += [
        f"config.model.{name} = {value!r}"
        for name, value in find_meaning(model).items()
        if found[name] != value
    ]
    return values, lines


def find_meaning(model: configs.Model) -> dict[str, Any]:
    """The fields that decide what the weights of a resolved model mean, with one spelling each.

    Fields without an effect have their default, and layers are listed one by one.
    """
    without_effect = {name for applies, names in WITHOUT_EFFECT if applies(model) for name in names}
    values = {
        spec.name: spec.default if spec.name in without_effect else getattr(model, spec.name)
        for spec in fields(model)
        if spec.name not in TRAINING
    }
    layers = configs.layer_specs(model)
    return values | {
        "pattern": tuple((spec.mixer, spec.ffn) for spec in layers),
        "windows": tuple(spec.window for spec in layers),
    }


def _has_no_dense_layer(model: configs.Model) -> bool:
    return all(spec.ffn == "moe" for spec in configs.layer_specs(model))


# When fields of a model have no effect.
WITHOUT_EFFECT = (
    (lambda model: True, ("last_window_full",)),
    (lambda model: not model.bias, ("qkv_bias",)),
    (lambda model: not model.qk_norm, ("qk_norm_over", "qk_norm_after_rope", "qk_scale")),
    (_has_no_dense_layer, ("mlp",)),
    (
        lambda model: model.position != "rotary",
        ("rope_base", "rope_local_base", "rope_fraction", "rope_scale_factor"),
    ),
    (
        lambda model: model.position != "rotary" or model.rope_scale_factor == 1,
        ("rope_scaling", "rope_scale_low", "rope_scale_high", "rope_scale_original_seq"),
    ),
    (
        lambda model: model.rope_scaling == "linear",
        ("rope_scale_low", "rope_scale_high", "rope_scale_original_seq"),
    ),
    (
        lambda model: not configs.has_experts(model),
        (
            "experts",
            "experts_per_token",
            "expert_mlp",
            "expert_ffn",
            "shared_experts",
            "router",
            "router_normalize",
        ),
    ),
)
