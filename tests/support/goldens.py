"""The goldens of tests/interop: their directories, configs, and how a changed one is refused."""

import json
from pathlib import Path

import pytest

from gpt_jax.errors import UsageError
from gpt_jax.interop.foreign import open_foreign

GOLDENS = Path(__file__).parents[1] / "interop/goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = b"[" * 100_000  # more than a parser that calls itself can open


def read_config(name: str) -> dict:
    """The `config.json` of a golden."""
    return json.loads((GOLDENS / name / "config.json").read_text())


def refuse(directory: Path) -> list[str]:
    """The lines with which a directory is refused."""
    with pytest.raises(UsageError) as error:
        open_foreign(directory)
    assert all(isinstance(line, str) and "\n" not in line for line in error.value.args)
    return list(error.value.args)
