"""Parameters that a config names, by role or by a pattern of their paths."""

import re
from collections.abc import Mapping
from typing import Any

from gpt_jax.errors import UsageError
from gpt_jax.train.optim.groups import Describe

SHOWN_PATHS = 4  # in a message


def find_parameters(
    targets: tuple[str, ...], leaves: Mapping[str, Any], describe: Describe, field: str
) -> list[set[str]]:
    """The paths of `leaves` that each target names.

    A target is the role of a parameter, or a regular expression that is searched in paths. `field`
    is where a user wrote them. Raises UsageError for a target that names nothing.
    """
    roles = {path: describe(path).role for path in leaves}
    named = []
    for i, target in enumerate(targets):
        paths = {path for path, role in roles.items() if role == target}
        if not paths:
            pattern = compile_pattern(target, f"{field}[{i}]")
            paths = {path for path in leaves if pattern.search(path)}
        if not paths:
            raise UsageError(
                f"{field}[{i}] = {target!r}: is no role and is found in no path of this model; its "
                f"roles are {', '.join(sorted(set(roles.values())))}, and its paths look like "
                f"{', '.join(list(leaves)[:SHOWN_PATHS])}"
            )
        named.append(paths)
    return named


def compile_pattern(text: str, field: str) -> re.Pattern:
    """A regular expression. Raises UsageError, which names the field, for a text that is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"{field} = {text!r}: is neither a role nor a regular expression: {error}"
        ) from None
