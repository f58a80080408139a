"""What a foreign directory lacks to be of a family, and which family is the nearest one.

A model of an unknown `model_type` is often a known one with one more key, or with two more norms.
So people need the cause, in few lines: keys, and kinds of tensors.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gpt_jax.errors import UsageError
from gpt_jax.interop.architecture import find_unknown, read_fields, resolve_model
from gpt_jax.interop.families import FAMILIES, Family
from gpt_jax.interop.weights import (
    Readable,
    find_shape,
    find_tensor,
    is_leftover,
    make_plan,
    name_fully,
)

# Kinds of tensors, and keys, that a line names. A model of another make may have hundreds.
NAMED = 12
# Fields without which no table of tensors can be made.
SIZES = frozenset(["embed", "heads", "layers", "max_seq", "vocab"])
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Misfit(NamedTuple):
    """Why a directory is not of a family. Tensors are counted by kind."""

    family: Family
    keys: tuple[str, ...]  # that are not understood, with their values
    faults: tuple[str, ...]  # of the values of other keys, a line each
    missing: Mapping[str, int]
    surplus: Mapping[str, int]
    misshapen: Mapping[str, int]
    is_whole: bool = True  # whether the config says enough for a table of all tensors

    @property
    def size(self) -> int:
        """How many keys and kinds of tensors do not fit."""
        return sum(map(len, self[1:6]))


def find_kind(name: str) -> str:
    """The name of a tensor with a * for layer and expert.

    >>> find_kind("model.layers.12.mlp.up_proj.weight")
    'model.layers.*.mlp.up_proj.weight'
    """
    return NUMBER.sub("*", name)


def count_kinds(names: Iterable[str]) -> Counter[str]:
    """How many tensors there are of each kind."""
    return Counter(map(find_kind, names))


def find_misfit(
    family: Family,
    values: Mapping[str, Any],
    tensors: Mapping[str, Readable],
    ignored: tuple[str, ...] = (),
) -> Misfit:
    """What keeps a `config.json` and its tensors from being of a family.

    Where the config describes no model of it, kinds of tensors are compared with the family's whole
    table. What is missing is not known then.
    """
    values = {**values, "model_type": family.name}
    unknown = find_unknown(values, family, ignored)
    keys = tuple(f"{name} = {values[name]!r}" for name in unknown)
    tensors = name_fully(tensors, family)
    fields, faults = read_fields(values, family)
    try:
        if not fields.keys() >= SIZES:
            raise UsageError(*faults)
        model = resolve_model(fields)
        plan = make_plan(family, model)
    except UsageError as error:
        faults = faults or error.args
        known = {re.sub(r"\{\w+\}", "*", row.theirs) for row in family.rows}
        surplus = [name for name in tensors if not is_leftover(name, family)]
        kinds = {kind: n for kind, n in count_kinds(surplus).items() if kind not in known}
        return Misfit(family, keys, tuple(faults), {}, kinds, {}, False)

    wanted = {piece.name: find_shape(plan, piece) for piece in plan.pieces}
    if model.tied:  # Files may have the head that is the embedding once more.
        head = find_tensor(family, "head/kernel")
        tensors = {name: tensor for name, tensor in tensors.items() if name != head}
    both = wanted.keys() & tensors.keys()
    return Misfit(
        family,
        keys,
        tuple(faults),
        count_kinds(name for name in wanted if name not in tensors),
        count_kinds(
            name for name in tensors if name not in wanted and not is_leftover(name, family)
        ),
        count_kinds(
            name for name in wanted if name in both and tensors[name].shape != wanted[name]
        ),
    )


def explain_unknown(values: Mapping[str, Any], tensors: Mapping[str, Readable]) -> list[str]:
    """Lines about the family that a model of an unknown `model_type` is nearest to."""
    families = [family for family in FAMILIES.values() if family.is_written]
    misfits = [find_misfit(family, values, tensors) for family in families]
    nearest = min(misfits, key=lambda misfit: (not misfit.is_whole, misfit.size))
    name = nearest.family.name
    if not nearest.size:
        return [
            f"nearest is {name}, and nothing differs; if the model computes what a {name} does, "
            f"set model_type to {name!r} in config.json"
        ]
    return [f"nearest is {name}, and these differ:", *describe_misfit(nearest)]


def describe_misfit(misfit: Misfit) -> list[str]:
    """A line for each way in which a directory does not fit."""
    lines = []
    if misfit.keys:
        lines.append(f"  keys that are not understood: {_list_some(misfit.keys)}")
    lines += [f"  {fault}" for fault in misfit.faults]
    return lines + describe_tensors(misfit)


def describe_tensors(misfit: Misfit) -> list[str]:
    """A line for each way in which tensors do not fit."""
    name = misfit.family.name
    tables = (
        ("missing", misfit.missing),
        (f"without a place in {name}", misfit.surplus),
        ("of another shape", misfit.misshapen),
    )
    return [
        f"  tensors {what}: {_list_some([f'{kind} ({count})' for kind, count in kinds.items()])}"
        for what, kinds in tables
        if kinds
    ]


def _list_some(entries: Iterable[str]) -> str:
    entries = list(entries)
    rest = len(entries) - NAMED
    return ", ".join(entries[:NAMED]) + (f", and {rest} more" if rest > 0 else "")
