"""`--task_options`: pairs of `NAME=VALUE`, as people type them."""

import json

from gpt_jax.errors import UsageError


def parse_task_options(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of `NAME=VALUE` texts. Raises UsageError for a text without a name or value.

    In values that are no JSON, `\\n` stands for an end of line and `\\t` for a tabulator, because a
    shell has no short way to write them.
    """
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--task_options {text}: expected NAME=VALUE")
        if not value:
            raise UsageError(f"--task_options {text}: has no value; give one, or leave it out")
        if not value.startswith(("{", "[")) or not is_json(value):
            value = value.replace("\\n", "\n").replace("\\t", "\t")
        pairs.append((name, value))
    return tuple(pairs)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
