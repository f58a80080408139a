"""A Config from nested mappings and command-line text, and back; how two of them differ."""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from gpt_jax.config.fields import RESUMABLE, Config
from gpt_jax.errors import UsageError

# Where a key of an older config is today. A config file or a flag that uses one is refused with
# the new name; the config inside a checkpoint is translated.
RENAMED = {
    "data.rows": "data.packing",
    "data.apart": "data.document_mask",
    "data.stages": "data.phases",
    "model.dtype": "compute.dtype",
    "model.kernel": "compute.kernel",
    "model.remat": "compute.remat",
    "model.unroll": "compute.unroll",
    "model.shard_sequence": "compute.shard_sequence",
    "model.pipeline_rounds": "compute.pipeline_rounds",
    "model.pipeline_microbatches": "compute.pipeline_microbatches",
    "train.compiler_options": "compute.compiler_options",
}


def _way_out(path: str, name: str, known) -> str:
    """What to write in place of the unknown key `name` of the section `path`."""
    key = f"{path}.{name}".removeprefix("config.")
    if key in RENAMED:
        return f"is config.{RENAMED[key]} now"
    near = difflib.get_close_matches(name, known, 1, 0.5)
    if near:
        return f"unknown key; did you mean {path}.{near[0]}?"
    return f"unknown key; known keys: {', '.join(known) or 'none'}"


def translate(values: Mapping[str, Any]) -> dict:
    """The config of a checkpoint, written by any earlier version, with today's keys."""
    sections = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if key in sections.get(section, {}):
            there, name = new.split(".")
            sections.setdefault(there, {})[name] = sections[section].pop(key)
    return sections


def _describe(kind) -> str:
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _coerce(kind, value, path: str):
    """`value` as `kind`, or a UsageError naming `path`. Ints pass as floats, lists as tuples;
    nothing else bends."""
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
        return tuple(
            _coerce(k, v, f"{path}[{i}]")
            for i, (k, v) in enumerate(zip(kinds, value, strict=False))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UsageError(
            f"{path} = {value!r}: expected {_describe(kind)}, got {_describe(type(value))}"
        )
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{path} = {value!r}: expected a finite number")
    return value


def _check_limits(spec: dataclasses.Field, value, path: str) -> None:
    low, high, choices = (spec.metadata.get(k) for k in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        raise UsageError(f"{path} = {value!r}: choose one of {', '.join(map(str, choices))}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = (
            f"at least {low}"
            if high is None
            else f"{low} (reserved)"
            if low == high
            else f"from {low} to {high}"
        )
        raise UsageError(f"{path} = {value!r}: expected {bounds}")


def from_dict(values: Mapping[str, Any], kind=Config, path: str = "config"):
    """A frozen `kind` from nested mappings (a ConfigDict too).

    Raises UsageError if a key is unknown, a type is wrong or a value is out of range. It has one
    line for each fault, with the field, the value and the way out.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UsageError(f"{path} = {values!r}: expected a section with named fields")

    specs = {spec.name: spec for spec in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    made, faults = {}, []
    for name, value in values.items():
        key = f"{path}.{name}"
        try:
            if name not in specs:
                raise UsageError(f"{key} = {value!r}: {_way_out(path, name, specs)}")
            made[name] = _coerce(hints[name], value, key)
            _check_limits(specs[name], made[name], key)
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("\n".join(faults))
    return kind(**made)


def to_dict(config) -> dict:
    """Nested plain dicts; tuples become lists, as JSON reads them back."""
    return json.loads(to_json(config))


def to_json(config) -> str:
    """The whole config as JSON, defaults included; `from_dict(json.loads(text))` gives the same
    Config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def flatten(config) -> dict[str, Any]:
    """`{"model.layers": 4, …}`; groups and other tuples stay whole, but the paths of
    data.sources, which may differ between machines, are a key of their own."""
    out = {}
    for name, value in to_dict(config).items():
        out |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    sources = out["data.sources"]
    out["data.sources"] = [[name, weight] for name, _, weight in sources]
    out["data.source_paths"] = [path for _, path, _ in sources]
    return out


def changes(old, new) -> list[tuple[str, Any, Any, bool]]:
    """(key, old value, new value, may resume) for every field that differs between two Configs."""
    before, after = flatten(old), flatten(new)
    return [
        (key, before[key], after[key], key in RESUMABLE or key.split(".")[0] in RESUMABLE)
        for key in after
        if before[key] != after[key]
    ]


def override(values: dict, key: str, text: str) -> None:
    """Sets `section.field` of nested dict `values` from command-line text, parsed by the field's
    type."""
    *sections, name = key.split(".")
    kind, path = Config, "config"
    for section in [*sections, name]:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if section not in hints:
            raise UsageError(f"{path}.{section} = {text!r}: {_way_out(path, section, hints)}")
        kind, path = hints[section], f"{path}.{section}"
    if dataclasses.is_dataclass(kind):
        raise UsageError(
            f"{path} = {text!r}: is a section; set one of its fields: "
            f"{', '.join(typing.get_type_hints(kind))}"
        )
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = parse(kind, text, path)


def parse(kind, text: str, path: str):
    """Command-line text as a value of type `kind`: numbers with underscores, true/false, `a,b`
    or a Python tuple."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            value = (
                float(text) if "e" in text.lower() else int(text)
            )  # 1e6 steps is a whole number too
            if value != int(value):
                raise ValueError
            return int(value)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        if (
            isinstance(kind, types.GenericAlias)
            and typing.get_args(kind)[0] is str
            and not text.startswith("(")
        ):
            return tuple(part for part in text.split(",") if part)
        value = ast.literal_eval(text)
        return value if isinstance(value, tuple) else (value,)
    except (ValueError, KeyError, SyntaxError, OverflowError):
        like = (
            ", such as (a, b) with quotes around texts"
            if isinstance(kind, types.GenericAlias)
            else ""
        )
        raise UsageError(f"{path} = {text!r}: expected {_describe(kind)}{like}") from None
