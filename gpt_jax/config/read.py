"""A Config from nested mappings and from command-line text, and how two Configs differ."""

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
from gpt_jax.config.knobs import MOST, fields_of, is_section, key_of
from gpt_jax.errors import UsageError
from gpt_jax.files import is_there

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
    sections = {}
    for name, value in values.items():
        sections[name] = dict(value) if isinstance(value, Mapping) else value

    for old, new in RENAMED.items():
        old_section, old_name = old.split(".")
        new_section, new_name = new.split(".")
        old_values = sections.get(old_section)
        # What is no section stays, and `from_dict` refuses it.
        if not isinstance(old_values, dict) or old_name not in old_values:
            continue
        new_values = sections.setdefault(new_section, {})
        if isinstance(new_values, dict):
            new_values[new_name] = old_values.pop(old_name)
    return sections


def read_saved(values: Mapping[str, Any]) -> Config:
    """The Config that a checkpoint or a workdir holds, written by this or an earlier version."""
    return from_dict(translate(values))


def _describe(kind) -> str:
    """The name of a type, for messages."""
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))


def _coerce(kind, value, path: str):
    """`value` as `kind`.

    An int becomes a float, a list a tuple, and one text a tuple of texts. Raises UsageError, which
    names `path`, for a value of any other type.
    """
    if is_section(kind):
        return from_dict(value, kind, path)
    if typing.get_origin(kind) is tuple:
        return _coerce_tuple(typing.get_args(kind), value, path)

    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UsageError(
            f"{path} = {value!r}: expected {_describe(kind)}, got {_describe(type(value))}"
        )
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{path} = {value!r}: expected a finite number")
    return value


def _coerce_tuple(arguments: tuple, value, path: str) -> tuple:
    """`value` as a tuple whose entries have the types `arguments`, see `_coerce`."""
    if isinstance(value, str) and arguments == (str, Ellipsis):
        value = (value,)
    if not isinstance(value, (tuple, list)):
        raise UsageError(f"{path} = {value!r}: expected a tuple, such as (a, b)")

    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(kinds) != len(value):
        raise UsageError(f"{path} = {value!r}: expected {len(kinds)} entries")
    entries = []
    for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)):
        entries.append(_coerce(kind, entry, f"{path}[{i}]"))
    return tuple(entries)


def _check_limits(spec: dataclasses.Field, value, path: str) -> None:
    """Raises UsageError for a value outside the limits of its field."""
    choices = spec.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(f"{path} = {value!r}: choose one of {', '.join(map(str, choices))}")

    low = spec.metadata.get("low")
    high = spec.metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{path} = {value!r}: expected {bounds}")
    numbers = value if isinstance(value, tuple) else (value,)
    if high is None and any(type(number) is int and number > MOST for number in numbers):
        raise UsageError(f"{path} = {value!r}: expected at most {MOST}")


def from_dict(values: Mapping[str, Any], kind: Any = Config, path: str = "config") -> Any:
    """A frozen `kind` from nested mappings (a ConfigDict too).

    Raises UsageError if a key is unknown, a type is wrong or a value is out of range. It has one
    line for each fault, with the field, the value and the way out.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UsageError(f"{path} = {values!r}: expected a section with named fields")

    specs = fields_of(kind)
    hints = typing.get_type_hints(kind)
    fields = {}
    faults = []
    for name, value in values.items():
        key = f"{path}.{name}"
        try:
            if name not in specs:
                raise UsageError(f"{key} = {value!r}: {_way_out(path, name, specs)}")
            spec = specs[name]
            fields[spec.name] = _coerce(hints[spec.name], value, key)
            _check_limits(spec, fields[spec.name], key)
        except UsageError as error:
            faults += error.args
    if faults:
        raise UsageError(*faults)
    return kind(**fields)


def to_dict(config) -> dict:
    """A config as nested plain dicts. Tuples become lists, as JSON reads them back."""
    return json.loads(to_json(config))


def to_json(config) -> str:
    """The whole config as JSON, defaults included.

    `from_dict(json.loads(text))` gives the same Config.
    """

    def name_keys(pairs):
        return {key_of(name): value for name, value in pairs}

    return json.dumps(dataclasses.asdict(config, dict_factory=name_keys), indent=2)


def flatten(config) -> dict[str, Any]:
    """The values of a config by their keys: `{"model.layers": 4, …}`.

    Groups and other tuples stay whole. The paths of data.sources and eval.sets have keys of their
    own, because they may differ between machines.
    """
    values = {}
    for name, value in to_dict(config).items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            values[name] = value

    sources = values["data.sources"]
    values["data.sources"] = [[name, weight] for name, _, weight in sources]
    values["data.sources.paths"] = [path for _, path, _ in sources]
    sets = values["eval.sets"]
    values["eval.sets"] = [name for name, _ in sets]
    values["eval.sets.paths"] = [path for _, path in sets]
    return values


class Change(typing.NamedTuple):
    """A field that differs between two Configs."""

    key: str
    old: Any
    new: Any
    effect: str | None  # what it does to a run that resumes, "" for nothing; None if it may not


def changes(old, new) -> list[Change]:
    """Every field that differs between two Configs."""
    before = flatten(old)
    after = flatten(new)
    return [
        Change(key, before[key], after[key], RESUMABLE.get(key, RESUMABLE.get(key.split(".")[0])))
        for key in after
        if before[key] != after[key]
    ]


def override(values: dict, key: str, text: str) -> None:
    """Sets `section.field` of the nested dict `values` to command-line text.

    The field's type says how the text is read. Raises UsageError for an unknown key, and for text
    that is not of that type.
    """
    *sections, name = key.split(".")
    kind = Config
    path = "config"
    entries = "names"
    for part in [*sections, name]:
        hints = {}
        if is_section(kind):
            hints = {key_of(name): hint for name, hint in typing.get_type_hints(kind).items()}
        if part not in hints:
            raise UsageError(f"{path}.{part} = {text!r}: {_way_out(path, part, hints)}")
        specs = fields_of(kind)
        entries = specs[part].metadata.get("entries", "names")
        kind = hints[part]
        path = f"{path}.{part}"
    if is_section(kind):
        fields = ", ".join(fields_of(kind))
        raise UsageError(f"{path} = {text!r}: is a section; set one of its fields: {fields}")

    for section in sections:
        values = values.setdefault(section, {})
    values[name] = parse(kind, text, path, entries)


def parse(kind, text: str, path: str, entries: str = "names"):
    """Command-line text as a value of type `kind`.

    Numbers may have underscores, bools are true or false, and tuples are `a,b` or Python's own.
    `entries` is that of `knob`. Raises UsageError, which names `path`, for text that is not of that
    type.
    """
    try:
        return _parse(kind, text, path, entries)
    except (ValueError, KeyError, SyntaxError, OverflowError):
        example = ""
        if isinstance(kind, types.GenericAlias):
            example = ", such as (a, b) with quotes around texts"
        raise UsageError(f"{path} = {text!r}: expected {_describe(kind)}{example}") from None


def _parse(kind, text: str, path: str, entries: str):
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if kind is int:
        return _parse_int(text)
    if kind is float:
        return float(text)
    if kind is str:
        return text

    is_texts = isinstance(kind, types.GenericAlias) and typing.get_args(kind)[0] is str
    if is_texts and not text.startswith("("):
        return ENTRIES[entries](text, path)
    value = ast.literal_eval(text)
    return value if isinstance(value, tuple) else (value,)


# ---- a tuple of texts, written as one plain text ----


def _split_names(text: str, path: str) -> tuple[str, ...]:
    """Names hold no comma, so a comma separates them."""
    return tuple(part for part in text.split(",") if part)


def _split_paths(text: str, path: str) -> tuple[str, ...]:
    """A comma separates paths, unless it is part of one that is there.

    Raises UsageError, which names the field `path`, if both can be meant.
    """
    parts = _split_names(text, path)
    if not (parts[1:] and is_there(text)):
        return parts
    if all(is_there(part) for part in parts):
        raise UsageError(
            f"{path} = {text!r}: is one path and also {len(parts)}, all of which are there; write "
            f'"({text!r},)" for the one, or "{parts!r}" for the others'
        )
    return (text,)


def _keep_whole(text: str, path: str) -> tuple[str, ...]:
    """What people write may hold commas, so one text is one entry."""
    return (text,) if text else ()


ENTRIES = {"names": _split_names, "paths": _split_paths, "prose": _keep_whole}


def _parse_int(text: str) -> int:
    """A whole number, which may be written as 1e6. Raises ValueError or OverflowError."""
    value = float(text) if "e" in text.lower() else int(text)
    if value != int(value):
        raise ValueError
    return int(value)
