"""Writes adapters of low rank as a directory that the library `peft` loads.

The directory has `adapter_config.json` and `adapter_model.safetensors`. Names of modules are those
of the family in `transformers`, so the base must be a directory of Hugging Face as well.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax import config as configs
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.files import describe_error, sync_folder, write_file
from gpt_jax.interop.architecture import write_config
from gpt_jax.interop.export import Entry, find_own_family, read_source, write_tensors
from gpt_jax.interop.families import find_family
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.weights import Piece, Plan, make_plan

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Layouts of a tensor that is one matrix of ours. True: it lies as (in, out), as in GPT-2's Conv1D.
ALONE = {"transposed": False, "same": True}

# Our parts of an adapter: the end of peft's key.
ENDS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}


class Part(NamedTuple):
    """A tensor of the file, float32."""

    name: str
    values: np.ndarray


def list_modules(plan: Plan, paths: Mapping[str, object]) -> dict[str, Piece]:
    """{name of a module: its tensor} for the matrices at `paths`, in the family's order.

    Raises UsageError if one of them is only a part of a tensor of the family.
    """
    modules = {}
    for piece in plan.pieces:
        adapted = [slot.path for slot in piece.slots if slot.path in paths]
        if not adapted:
            continue
        if piece.layout not in ALONE or len(piece.slots) > 1:
            raise UsageError(
                f"--format=peft: {piece.name} of this family holds {len(piece.slots)} matrices of "
                f"ours in one, such as {adapted[0]}, so it has no adapter of this rank; merge "
                "instead, with --format=hf"
            )
        modules[piece.name.removesuffix(".weight")] = piece
    return modules


def list_parts(
    modules: Mapping[str, Piece], adapters: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[Part]:
    """The tensors of the file. Those of torch are transposed: lora_A is [R, in]."""
    for name, piece in modules.items():
        slot = piece.slots[0]
        for part, values in adapters[slot.path].items():
            yield Part(f"{PREFIX}{name}.{ENDS[part]}", np.ascontiguousarray(values[slot.index].T))


def make_config(lora: configs.Lora, base: str, modules: Mapping[str, Piece]) -> dict[str, object]:
    """The `adapter_config.json` of adapters of these modules."""
    is_turned = {ALONE[piece.layout] for piece in modules.values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": is_turned == {True},
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "r": lora.rank,
        "target_modules": list(modules),
        "use_dora": lora.variant == "dora",
        "use_rslora": lora.variant == "rslora",
    }


def write_peft(
    origin: Origin,
    lora: configs.Lora,
    adapters: Mapping[str, Mapping[str, np.ndarray]],
    base: str,
    directory: Path,
    family: str = "",
) -> None:
    """Writes `directory`, which must not exist. It appears whole or not at all.

    `origin` is the model with its adapters, which are {path of a matrix: {part: values}}. `base` is
    where the weights beneath lie. Raises UsageError if no family has such a model or such adapters,
    and SaveFailed if the disk does not take it.
    """
    values = write_config(
        origin.model, family or find_own_family(origin.model, read_source(origin))
    )
    plan = make_plan(find_family(values["model_type"]), origin.model)
    modules = list_modules(plan, adapters)
    parts = list(list_parts(modules, adapters))
    settings = make_config(lora, base, modules)
    if directory.exists():
        raise UsageError(f"{directory}: is there already; name a new directory")

    unfinished = directory.with_name(directory.name + ".unfinished")
    entries = [
        Entry(Piece(part.name, "same", ()), part.values.shape, part.values.nbytes) for part in parts
    ]
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_tensors(unfinished / TENSORS, entries, "F32", (part.values for part in parts))
        write_file(unfinished / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())
        sync_folder(unfinished)
        unfinished.rename(directory)
        sync_folder(directory.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveFailed(f"{directory}: writing failed: {describe_error(error)}") from error
