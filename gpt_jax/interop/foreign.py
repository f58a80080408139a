"""Opens a model of another project: its config, its tensors, and the files that go with them."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import config as configs
from gpt_jax.data import Spec, Tokenizer, find_begin, resolve_tokenizer, with_frame
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.families import Family, find_family
from gpt_jax.interop.keras_file import open_keras
from gpt_jax.interop.llama2c import open_llama2c
from gpt_jax.interop.nanogpt import open_nanogpt
from gpt_jax.interop.nearest import describe_tensors, explain_unknown, find_misfit
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.tensors import Tensor, list_tensors
from gpt_jax.interop.weights import Weights, check_tensors, find_tensor, make_plan, name_fully

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What belongs to one tokenizer, and to no other.
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Files that are carried byte for byte.
CARRIED = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    # It is not written again. Its family and its special tokens are.
    CONFIG,
)


def read_values(directory: Path) -> dict[str, Any]:
    """The `config.json` of a directory. Raises UsageError."""
    path = directory / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {describe_error(error)}; a model's directory has one") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: is no JSON object")
    return values


def open_directory(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json` of a directory, and its tensors by name. Raises UsageError."""
    values = read_values(path)
    _check_family(path, values)
    return values, list_tensors(path)


def _check_family(path: Path, values: Mapping[str, Any]) -> None:
    """Raises UsageError for an unknown `model_type`, with what the nearest family lacks."""
    try:
        find_family(values.get("model_type"))
    except UsageError as error:
        lines = []
        with suppress(UsageError):  # Tensors that cannot be read are not the cause.
            lines = explain_unknown(values, list_tensors(path))
        raise UsageError(*error.args, *lines) from None


def _is_directory(path: Path) -> bool:
    """Whether it has a `config.json` that is not the one of a run of ours."""
    if not (path / CONFIG).is_file() or (path / "checkpoints").exists():
        return False
    try:
        values = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return not (isinstance(values, dict) and {"model", "train", "data"} <= values.keys())


def _has_suffix(suffix: str) -> Callable[[Path], bool]:
    return lambda path: path.suffix == suffix and path.is_file()


# What can be opened: whether a path is that, and the function that gives the values of a
# `config.json` and the tensors by name.
READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], tuple[dict, Mapping]]], ...] = (
    (_is_directory, open_directory),
    (_has_suffix(".bin"), open_llama2c),
    (_has_suffix(".pt"), open_nanogpt),
    (_has_suffix(".h5"), open_keras),
)


def is_foreign(path: str | Path) -> bool:
    """Whether a path is a model of another project.

    Raises UsageError for a folder with the exports of a run, which are several.
    """
    path = Path(path)
    if any(fits(path) for fits, _ in READERS):
        return True
    steps = [int(child.name) for child in path.glob("[0-9]*") if _is_export(child)]
    if steps:
        newest = path / str(max(steps))
        raise UsageError(f"{path}: holds the exports of several steps; name one, such as {newest}")
    return False


def _is_export(path: Path) -> bool:
    return path.name.isdecimal() and _is_directory(path)


def read_foreign_model(path: str | Path, ignored: tuple[str, ...] = ()) -> configs.Model:
    """The model at a path for which `is_foreign` is true. Raises UsageError."""
    path = Path(path)
    if _is_directory(path):
        values = read_values(path)
        _check_family(path, values)
        return read_model(values, ignored)
    return read_model(_open(path)[0], ignored)


def _open(path: Path) -> tuple[dict, Mapping]:
    read = next((read for fits, read in READERS if fits(path)), open_directory)
    return read(path)


def open_foreign(path: str | Path, ignored: tuple[str, ...] = (), tokenizer: str = "") -> Origin:
    """The model at a path for which `is_foreign` is true, checked before a tensor is read.

    `tokenizer` is the spec of one that takes the place of what lies beside the weights. Raises
    UsageError with a line for each key or tensor that does not fit, and for a tokenizer that cannot
    be read.
    """
    path = Path(path)
    values, found = _open(path)
    family = find_family(values["model_type"])
    try:
        model = read_model(values, ignored)
    except UsageError as error:
        # A key that is not understood and a tensor without a place often have one cause.
        misfit = find_misfit(family, values, found, ignored)
        raise UsageError(*error.args, *describe_tensors(misfit)) from None
    plan = make_plan(family, model)
    tensors = _drop_second_head(name_fully(found, family), family, model)
    check_tensors(plan, family, tensors, str(path))
    weights = Weights(plan, tensors)
    return Origin(
        name=str(path),
        model=model,
        shapes=plan.shapes,
        read=weights.read,
        tokenizer=find_tokenizer(path, tokenizer),
        carried={name: (path / name).read_bytes() for name in CARRIED if (path / name).is_file()},
        family=family.name,
        files=list_sources(path, found),
        name_slice=weights.find_name,
    )


def list_sources(path: Path, tensors: Mapping) -> tuple[Path, ...]:
    """The files that a model was read from. Of a directory those are more than its tensors'."""
    if path.is_file():
        return (path,)
    weights = {tensor.path for tensor in tensors.values()}
    beside = {path / name for name in CARRIED if (path / name).is_file()}
    return tuple(sorted(weights | beside))


def find_tokenizer(directory: Path, spec: str = "") -> Tokenizer | None:
    """The tokenizer of a spec, or of the files in a directory. None if it has none.

    Raises UsageError for a spec of a tokenizer that is made from text, and for files that are no
    tokenizer.
    """
    if not spec and not any((directory / name).is_file() for name in TOKENIZERS):
        return None
    field = "--tokenizer" if spec else "tokenizer"
    found = resolve_tokenizer(spec or str(directory), field)
    if isinstance(found, Spec):
        raise UsageError(f"--tokenizer={spec}: is made from text; name bytes or a file")
    begin = find_begin(found) if found.kind == "json" else found.begin
    return with_frame(found, begin, find_ends(directory, found))


def find_ends(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text, of `generation_config.json` or else of `config.json`.

    An id that the tokenizer does not have ends nothing, and is left out.
    """
    for name in (GENERATION, CONFIG):
        try:
            found = json.loads((directory / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        ids = found if isinstance(found, list) else [found]
        known = [i for i in ids if type(i) is int and 0 <= i < tokenizer.vocab]
        if known:
            return known
    return []


def _drop_second_head(tensors, family: Family, model: configs.Model):
    """The tensors without a head that is the embedding once more.

    Raises UsageError if the config calls it the embedding, and the file has other values.
    """
    head = find_tensor(family, "head/kernel")
    table = find_tensor(family, "embed/table")
    if not model.tied or head not in tensors or table not in tensors:
        return tensors
    first = tensors[head].read()
    second = tensors[table].read()
    # NaN is no number that is equal to another, so the same NaN twice needs a second look.
    is_same = np.array_equal(first, second) or np.array_equal(first, second, equal_nan=True)
    if not is_same:
        raise UsageError(
            f"config.json: tie_word_embeddings is true, and {head} is not {table}; set it to false"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}
