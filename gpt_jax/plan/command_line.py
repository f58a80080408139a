"""The command that trains the config that a search chose."""

import shlex
from pathlib import Path
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.job import resolve_vocab
from gpt_jax.plan.search import list_overrides


class CommandLine(NamedTuple):
    """Where a config comes from, without the overrides that a search chooses itself."""

    spec: str  # The value of --config.
    overrides: list[str]
    config: configs.Config  # What the two give.


def choose_overrides(line: CommandLine, best: configs.Config) -> tuple[list[str], list[str]]:
    """Returns (overrides that make `best`, overrides of the line that `best` replaces)."""
    changes = list_overrides(resolve_vocab(line.config), best)
    keys = {change.partition("=")[0] for change in changes}
    replaced = [text for text in line.overrides if text.partition("=")[0] in keys]
    others = [text for text in line.overrides if text not in replaced]
    return [*others, *changes], replaced


def describe_replaced(replaced: list[str]) -> list[str]:
    """Returns a line about each override that the best mesh replaces."""
    return [f"{text}: does not divide over the best mesh, and is replaced" for text in replaced]


def format_command(spec: str, overrides: list[str]) -> str:
    """Returns the shell's command that trains the config of `spec` with these overrides."""
    path, _, variant = spec.partition(":")
    name = Path(path).stem
    if variant:
        name = f"{name}-{variant.strip('/').replace('/', '-')}"
    words = ["gpt-jax", "train", f"--config={spec}", f"--workdir=runs/{name}", *overrides]
    return shlex.join(words)
