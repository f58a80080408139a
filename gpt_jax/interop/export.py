"""Writes a model as a directory of Hugging Face: config, tensors in shards, tokenizer."""

import base64
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gpt_jax import config as configs
from gpt_jax.data import Tokenizer, export_json
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.files import describe_error, sync_file, sync_folder, write_file
from gpt_jax.interop.architecture import write_config
from gpt_jax.interop.families import FAMILIES, find_family
from gpt_jax.interop.finite import describe_nonfinite, watch
from gpt_jax.interop.foreign import CONFIG, TOKENIZERS
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.strips import copy_into
from gpt_jax.interop.tensors import FILE, INDEX
from gpt_jax.interop.weights import Piece, Plan, find_shape, join_piece, make_plan

SHARD_BYTES = 5 * 10**9
# name of a dtype for users -> (its name in a file, numpy's)
EXPORTED = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
UNFINISHED = ".unfinished"


def refuse_nonfinite(line: str) -> None:
    """Raises UsageError for weights that are NaN or infinite."""
    raise UsageError(
        f"{line}; such a model may give no numbers, so nothing was written; if you want it all the "
        "same, --allow_nonfinite"
    )


class Entry(NamedTuple):
    """A tensor of the directory to be."""

    piece: Piece
    shape: tuple[int, ...]
    size: int  # bytes


def _list_entries(plan: Plan, item_bytes: int) -> list[Entry]:
    """Lists the pieces of a plan with their shapes and bytes."""
    entries = []
    for piece in plan.pieces:
        shape = find_shape(plan, piece)
        entries.append(Entry(piece, shape, int(np.prod(shape)) * item_bytes))
    return entries


def write_directory(
    origin: Origin,
    directory: Path,
    family: str = "",
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    meet_nonfinite: Callable[[str], None] = refuse_nonfinite,
) -> None:
    """Writes `directory`, which must not exist. It appears whole or not at all.

    `meet_nonfinite` gets a line if weights are NaN or infinite, before the directory appears. By
    default that is refused. `family` empty takes that of the origin, or the first that fits. Raises
    UsageError if no family has such a model, and SaveFailed if the disk does not take it.
    """
    origin, nonfinite = watch(origin)
    source = read_source(origin)
    values = write_config(origin.model, family or find_own_family(origin.model, source))
    plan = make_plan(find_family(values["model_type"]), origin.model)
    code, kind = EXPORTED[dtype]
    entries = _list_entries(plan, kind.itemsize)

    def read(entry: Entry) -> np.ndarray:
        values = join_piece(plan, entry.piece, origin.read)
        if dtype == "float16" and find_largest(values) > np.finfo(np.float16).max:
            raise UsageError(f"--dtype=float16: {entry.piece.name} has entries beyond its range")
        written = np.empty(values.shape, kind)
        copy_into(written, values)
        return written

    if directory.exists():
        raise UsageError(f"{directory}: is there already; name a new directory")
    unfinished = directory.with_name(directory.name + UNFINISHED)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_shards(unfinished, _cut(entries, shard_bytes), code, read)
        config = values | {"dtype": dtype, "torch_dtype": dtype} | _name_specials(origin, source)
        write_file(unfinished / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        for name, content in list_files(origin).items():
            write_file(unfinished / name, content)
        if nonfinite:
            meet_nonfinite(describe_nonfinite(nonfinite))
        sync_folder(unfinished)
        unfinished.rename(directory)
        sync_folder(directory.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise SaveFailed(f"{directory}: writing failed: {describe_error(error)}") from error


def find_largest(values: np.ndarray) -> float:
    """The largest absolute value of the entries that are finite, or 0."""
    is_finite = np.isfinite(values)
    high = values.max(where=is_finite, initial=0)
    low = values.min(where=is_finite, initial=0)
    return max(high, -low)


def read_source(origin: Origin) -> dict:
    """The `config.json` that the model came with, or {}."""
    return json.loads(origin.carried.get(CONFIG, b"{}"))


def find_own_family(model: configs.Model, source: dict) -> str:
    """The family that a model came from, if it is still one of it. Otherwise ""."""
    name = str(source.get("model_type", ""))
    if name not in FAMILIES or not FAMILIES[name].is_written:
        return ""
    try:
        write_config(model, name)
    except UsageError:
        return ""
    return name


def _name_specials(origin: Origin, source: dict) -> dict:
    """The ids of special tokens. Without them transformers would take those of its first model."""
    eot = None if origin.tokenizer is None else origin.tokenizer.eot
    own = {"bos_token_id": None, "eos_token_id": eot, "pad_token_id": None}
    return {name: source.get(name, value) for name, value in own.items()}


def list_files(origin: Origin) -> dict[str, bytes]:
    """The files beside the weights: those that came with the model, or its own tokenizer's."""
    carried = {name: content for name, content in origin.carried.items() if name != CONFIG}
    if origin.tokenizer is None or not carried.keys().isdisjoint(TOKENIZERS):
        return carried
    return _write_tokenizer(origin.tokenizer) | carried


def describe_left_out(origin: Origin) -> str:
    """A line about what `list_files` cannot say of the tokenizer, or ""."""
    tokenizer = origin.tokenizer
    if tokenizer is None or not origin.carried.keys().isdisjoint(TOKENIZERS):
        return ""
    if not _write_tokenizer(tokenizer):
        return f"the tokenizer {tokenizer.name} has no file there; name it where it is read"
    if tokenizer.kind == "sentencepiece" and tokenizer.extra:
        names = ", ".join(f"{name} = {i}" for name, i in tokenizer.extra.items())
        return f"tokenizer.model cannot hold added tokens; add them where it is read: {names}"
    return ""


def _write_tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer of ours, if it is of a kind that has some."""
    if tokenizer.kind == "json":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        names = {number: name for name, number in tokenizer.specials.items()}
        if tokenizer.eot in names:
            settings["eos_token"] = names[tokenizer.eot]
        return {
            "tokenizer.json": export_json(tokenizer).encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }
    if tokenizer.kind == "sentencepiece":
        return {"tokenizer.model": base64.b64decode(tokenizer.content)}
    return {}


def _cut(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Runs of tensors of at most so many bytes, or of one tensor."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _write_shards(folder: Path, shards: list[list[Entry]], code: str, read) -> None:
    """Writes the tensors, and an index if there are several files."""
    places = {}
    for number, shard in enumerate(shards, 1):
        name = FILE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / name, shard, code, read_ahead(read, shard))
        places |= {entry.piece.name: name for entry in shard}

    if len(shards) > 1:
        total = sum(entry.size for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_ahead(read: Callable[[Entry], np.ndarray], entries: Sequence[Entry]) -> Iterator:
    """Yields what `read` makes of each entry. A thread reads one while its forerunner is used."""
    with ThreadPoolExecutor(1, "read") as pool:
        waiting = None
        for entry in entries:
            following = pool.submit(read, entry)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def write_tensors(
    path: Path, entries: Sequence[Entry], code: str, arrays: Iterator[np.ndarray]
) -> None:
    """Writes a file of tensors, one at a time. The library would want all of them at once.

    The header is padded to 8 bytes, so that tensors are aligned.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.size]
        header[entry.piece.name] = {"dtype": code, "shape": entry.shape, "data_offsets": offsets}
        end += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
        sync_file(file)
