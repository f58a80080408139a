"""What `--task_options` may say: fields of a task's own dataclass, given as texts.

A field of type str takes its text as it stands. Any other field takes JSON.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

PLACE = re.compile(r"\{([^{}]*)\}")

Pairs = tuple[tuple[str, str], ...]


def parse_options(kind: type, given: Iterable[tuple[str, str]], **more: Any) -> Any:
    """The options of a task, of the dataclass `kind`, from pairs of names and texts.

    `more` are fields that the user sets elsewhere. Raises ValueError, which names the option.
    """
    fields = {spec.name: spec for spec in dataclasses.fields(kind) if spec.name not in more}
    values: dict[str, Any] = {}
    for name, text in given:
        if name not in fields:
            known = f"choose one of {', '.join(fields)}" if fields else "this task has none"
            raise ValueError(f"{name}: is no option of this task; {known}")
        if name in values:
            raise ValueError(f"{name}: is given twice")
        values[name] = text if fields[name].type is str else parse_pairs(name, text)
    return kind(**values, **more)


def parse_pairs(name: str, text: str) -> Pairs:
    """Pairs of a JSON object of texts. A list of texts pairs each with itself."""
    try:
        # Objects stay tuples of pairs. A dict would drop a name that stands twice.
        value = json.loads(text, object_pairs_hook=tuple)
    except ValueError as error:
        raise ValueError(f"{name}={text}: is no JSON ({error})") from None
    if isinstance(value, list):
        pairs = [(entry, entry) for entry in value]
    elif isinstance(value, tuple):
        pairs = list(value)
    else:
        pairs = []
    if not pairs or not all(isinstance(part, str) and part for pair in pairs for part in pair):
        raise ValueError(
            f'{name}={text}: expected a JSON object of texts, such as {{"0": " no", "1": " yes"}}, '
            "or a list of them"
        )
    names = [first for first, _ in pairs]
    twice = [first for first in names if names.count(first) > 1]
    if twice:
        raise ValueError(f"{name}={text}: {twice[0]!r} stands there twice; leave one out")
    return tuple(pairs)


def list_places(prompt: str) -> tuple[str, ...]:
    """The names in braces of a prompt, each once."""
    return tuple(dict.fromkeys(PLACE.findall(prompt)))


def fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with a text in the place of each name in braces. Texts may hold braces."""
    return PLACE.sub(lambda place: values[place[1]], prompt)
