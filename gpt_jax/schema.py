"""The shape that a JSON file must have, as a table, and a check of a value against it.

A file that is whole may still come from another program, or from somebody who changed it. So every
reader states what it needs, and gets that or a Misfit. A schema is one of these:

- a name of KINDS, such as "text";
- a set of the values that may stand there;
- `{name: schema}`, an object with these fields. It may have others. A field whose name ends in "?"
  may be missing, and then the "?" is no part of the name;
- `Each(schema)`, an object whose fields all fit one schema, whatever their names;
- `[schema]`, a list of any length, all of whose entries fit;
- `(schema, schema)`, a list of just these entries.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Schema = Any
LARGEST = 2**63  # whole numbers beyond it fit into no array and no file
SHOWN = 60  # characters of a value in a message


class Misfit(ValueError):
    """A text is no JSON, or a value does not fit its schema. The message says where and why."""


class Each(NamedTuple):
    """An object whose fields all fit `schema`."""

    schema: Schema


def _is_text(value) -> bool:
    return type(value) is str


def _is_number(value) -> bool:
    if type(value) is int:
        return abs(value) < LARGEST
    return type(value) is float


def _is_finite(value) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < LARGEST


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "number": _is_number,
    "finite number": _is_finite,
    "count": _is_count,
    "flag": lambda value: type(value) is bool,
    "object": lambda value: type(value) is dict,
    "text or number": lambda value: _is_text(value) or _is_number(value),
    "number or null": lambda value: value is None or _is_number(value),
}


def read_json(raw: bytes | str, schema: Schema) -> Any:
    """The value of a JSON text that fits `schema`. Raises Misfit for any other text."""
    try:
        value = json.loads(raw)
    except RecursionError:
        raise Misfit("nested too deeply") from None
    except ValueError as error:
        raise Misfit(f"not JSON: {error}") from None
    require(value, schema)
    return value


def require(value: Any, schema: Schema) -> None:
    """Raises Misfit if a parsed value does not fit `schema`."""
    problem = find_misfit(value, schema)
    if problem:
        raise Misfit(problem)


def find_misfit(value: Any, schema: Schema, place: str = "") -> str:
    """The first place at which `value` does not fit, and what was expected; "" if it fits."""
    if isinstance(schema, str):
        return "" if KINDS[schema](value) else _expected(place, value, _with_article(schema))
    if isinstance(schema, set):
        is_known = any(type(value) is type(known) and value == known for known in schema)
        names = ", ".join(sorted(map(str, schema)))
        return "" if is_known else _expected(place, value, f"one of {names}")
    if isinstance(schema, (Each, Mapping)):
        return _find_in_object(value, schema, place)
    return _find_in_list(value, schema, place)


def _find_in_object(value: Any, schema: Each | Mapping, place: str) -> str:
    if not isinstance(value, dict):
        return _expected(place, value, "an object")

    if isinstance(schema, Each):
        pairs = [(name, schema.schema) for name in value]
    else:
        pairs = []
        for name, inner in schema.items():
            field = name.removesuffix("?")
            if field in value:
                pairs.append((field, inner))
            elif field == name:
                return f"{_join(place, name)}: missing"

    problems = (find_misfit(value[name], inner, _join(place, name)) for name, inner in pairs)
    return next(filter(None, problems), "")


def _find_in_list(value: Any, schema: list | tuple, place: str) -> str:
    # Values that were never written as JSON have tuples where JSON has lists.
    if not isinstance(value, (list, tuple)):
        return _expected(place, value, "a list")
    inner = schema * len(value) if isinstance(schema, list) else schema
    if len(inner) != len(value):
        return _expected(place, value, f"a list of {len(inner)} entries")

    problems = (find_misfit(value[i], inner[i], f"{place}[{i}]") for i in range(len(value)))
    return next(filter(None, problems), "")


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _join(place: str, name: str) -> str:
    shown = name if name.isidentifier() else repr(name)[:SHOWN]
    return f"{place}.{shown}" if place else shown


def _expected(place: str, value: Any, wanted: str) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list"}
    shown = names.get(type(value)) or json.dumps(value)[:SHOWN]
    return f"{place or 'the whole'}: expected {wanted}, got {shown}"
