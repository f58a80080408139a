"""A directory of a foreign model: its config, its tensors, and the files that go with them."""

import json
from pathlib import Path
from typing import Any

from gpt_jax.data import Spec, Tokenizer, resolve_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.families import Family, find_family
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.tensors import list_tensors
from gpt_jax.interop.weights import Weights, check_tensors, make_plan

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
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


def open_foreign(directory: Path, ignored: tuple[str, ...] = (), tokenizer: str = "") -> Origin:
    """The model of a directory, checked whole before a tensor is read.

    `tokenizer` is the spec of one that takes the place of the directory's. Raises UsageError with
    a line for each key or tensor that does not fit, and for a tokenizer that cannot be read.
    """
    values = read_values(directory)
    model = read_model(values, ignored)
    family = find_family(values["model_type"])
    plan = make_plan(family, model)
    tensors = _name_fully(list_tensors(directory), family)
    check_tensors(plan, family, tensors, str(directory))
    weights = Weights(plan, tensors)
    return Origin(
        name=str(directory),
        model=model,
        shapes=plan.shapes,
        read=weights.read,
        tokenizer=find_tokenizer(directory, tokenizer),
        carried={
            name: (directory / name).read_bytes()
            for name in CARRIED
            if (directory / name).is_file()
        },
        family=family.name,
    )


def find_tokenizer(directory: Path, spec: str = "") -> Tokenizer | None:
    """The tokenizer of a spec, or of the directory's files. None if it has none.

    Raises UsageError for a spec of a tokenizer that is made from text, and for files that are no
    tokenizer.
    """
    if not spec and not any((directory / name).is_file() for name in TOKENIZERS):
        return None
    field = "--tokenizer" if spec else "tokenizer"
    found = resolve_tokenizer(spec or str(directory), field)
    if isinstance(found, Spec):
        raise UsageError(f"--tokenizer={spec}: is made from text; name bytes or a file")
    return found


def _name_fully(tensors, family: Family):
    """The tensors with the prefix that a file of the model without its head leaves out."""
    prefix = family.base
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    heads = tuple(row.theirs for row in family.rows if row.ours == ("head/kernel",))
    return {name if name in heads else prefix + name: tensor for name, tensor in tensors.items()}
