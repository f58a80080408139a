"""What every field means, as text for people, as JSON schema, and as a page of the manual."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator

from gpt_jax.config.fields import Config
from gpt_jax.config.knobs import fields_of, is_section
from gpt_jax.errors import UsageError


class Entry(typing.NamedTuple):
    """One field: its key without `config.`, its type, and its declaration."""

    key: str
    kind: typing.Any
    spec: dataclasses.Field


def list_sections() -> dict[str, type]:
    """The sections of a config and their dataclasses, in the order of `Config`."""
    hints = typing.get_type_hints(Config)
    return {name: kind for name, kind in hints.items() if is_section(kind)}


def list_entries(kind: type, path: str = "") -> Iterator[Entry]:
    """Every field below the dataclass `kind`, with keys that begin with `path`."""
    hints = typing.get_type_hints(kind)
    for key, spec in fields_of(kind).items():
        inner = hints[spec.name]
        if is_section(inner):
            yield from list_entries(inner, f"{path}{key}.")
        else:
            yield Entry(path + key, inner, spec)


def name_type(kind) -> str:
    """The type of a field in words that people use, such as `int` or `tuple of str`."""
    if typing.get_origin(kind) is not tuple:
        return kind.__name__
    arguments = [part for part in typing.get_args(kind) if part is not Ellipsis]
    names = ", ".join(name_type(part) for part in arguments)
    return f"tuple of {names}" if len(arguments) == 1 else f"({names})"


def describe_limits(spec: dataclasses.Field) -> str:
    """ "one of a, b", "from 0 to 1", "at least 1", or nothing."""
    low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
    if choices is not None:
        return f"one of {', '.join(map(str, choices))}"
    if high is not None:
        return f"from {low} to {high}"
    return "" if low is None else f"at least {low}"


def describe_config(key: str = "") -> str:
    """Text about one field, one section, or the whole config (`key` "").

    Raises UsageError if there is no such key.
    """
    entries = list(list_entries(Config))
    chosen = [entry for entry in entries if not key or f"{entry.key}.".startswith(f"{key}.")]
    if not chosen:
        known = [*list_sections(), *(entry.key for entry in entries)]
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"sections: {', '.join(list_sections())}"
        raise UsageError(f"--describe_config={key}: unknown key; {hint}")

    lines = []
    for entry in chosen:
        limits = describe_limits(entry.spec)
        about = name_type(entry.kind)
        if limits:
            about += f", {limits}"
        lines.append(f"--config.{entry.key}={entry.spec.default!r}  ({about})")
        lines.append(f"    {entry.spec.metadata['help']}")
    return "\n".join(lines)


JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def make_schema(kind=Config) -> dict:
    """The JSON schema (draft 2020-12) of the type of a field or of a section."""
    if is_section(kind):
        hints = typing.get_type_hints(kind)
        properties = {}
        for key, spec in fields_of(kind).items():
            properties[key] = make_schema(hints[spec.name]) | _describe_property(spec)
        about = (kind.__doc__ or "").split("\n\n")[0].strip()
        return {
            "type": "object",
            "description": about,
            "properties": properties,
            "additionalProperties": False,
        }

    if typing.get_origin(kind) is not tuple:
        return {"type": JSON_TYPES[kind]}

    arguments = typing.get_args(kind)
    if arguments[-1] is Ellipsis:
        return {"type": "array", "items": make_schema(arguments[0])}
    items = [make_schema(part) for part in arguments]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _describe_property(spec: dataclasses.Field) -> dict:
    """The keys of a schema that come from a field's declaration."""
    if "help" not in spec.metadata:
        return {}
    names = {"help": "description", "low": "minimum", "high": "maximum", "choices": "enum"}
    values = {name: spec.metadata[key] for key, name in names.items()}
    values["default"] = spec.default
    known = {name: value for name, value in values.items() if value is not None}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in known.items()}


def make_page() -> str:
    """The page docs/configs.md: a table for each section."""
    lines = [
        "# Every field of a config",
        "",
        "This page is made from the dataclasses in `gpt_jax/config` by "
        "`gpt-jax train --describe_config=page`. Do not edit it by hand; a test compares them.",
        "A field is set by a flag such as `--config.optim.learning_rate=3e-4`. How configs and "
        "overrides work is told in [overriding](overriding.md).",
    ]
    parts = {"config": [next(list_entries(Config))]}
    for name, kind in list_sections().items():
        parts[f"config.{name}"] = list(list_entries(kind))
        if name == "optim":
            group = typing.get_args(typing.get_type_hints(kind)["groups"])[0]
            parts["config.optim.groups[i]"] = list(list_entries(group))

    for title, entries in parts.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| field | default | limits | meaning |",
            "|---|---|---|---|",
        ]
        for entry in entries:
            limits = describe_limits(entry.spec) or name_type(entry.kind)
            text = entry.spec.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{entry.key}` | `{entry.spec.default!r}` | {limits} | {text} |")
    return "\n".join(lines) + "\n"
