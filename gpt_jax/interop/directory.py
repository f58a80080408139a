"""A directory of a foreign model: its config, its tensors, and the files that go with them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.families import Family, find_family
from gpt_jax.interop.tensors import list_tensors
from gpt_jax.interop.weights import Weights, check_tensors, make_plan

CONFIG = "config.json"
# Files that are carried byte for byte.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Foreign(NamedTuple):
    """A foreign model that was opened. Its weights are read when they are asked for."""

    directory: Path
    family: Family
    values: dict[str, Any]  # its config.json
    model: configs.Model
    weights: Weights


def is_foreign(path: str | Path) -> bool:
    """Whether a path is a directory of a foreign model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "checkpoints").exists()


def read_values(directory: Path) -> dict[str, Any]:
    """The `config.json` of a directory. Raises UsageError."""
    path = directory / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {describe_error(error)}; a model's directory has one") from None
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: is no JSON object")
    return values


def open_foreign(directory: Path, ignored: tuple[str, ...] = ()) -> Foreign:
    """The model of a directory, checked whole before a tensor is read.

    Raises UsageError with a line for each key or tensor that does not fit.
    """
    values = read_values(directory)
    model = read_model(values, ignored)
    family = find_family(values["model_type"])
    plan = make_plan(family, model)
    tensors = _name_fully(list_tensors(directory), family)
    check_tensors(plan, family, tensors, str(directory))
    return Foreign(directory, family, values, model, Weights(plan, tensors))


def _name_fully(tensors, family: Family):
    """The tensors with the prefix that a file of the model without its head leaves out."""
    prefix = family.base
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    heads = tuple(row.theirs for row in family.rows if row.ours == ("head/kernel",))
    return {name if name in heads else prefix + name: tensor for name, tensor in tensors.items()}
