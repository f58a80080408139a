"""Config files and their `--config.section.key=value` overrides."""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import config
from gpt_jax.commands.output import emit
from gpt_jax.errors import UsageError, plain


def find_workdir(text: str) -> Path | str:
    """The workdir that a flag means: a folder, or as a text the URL of one in an object store.

    Raises UsageError for a URL that names no folder of a store.
    """
    if "://" not in text:
        return Path(text)
    from gpt_jax.run import check_scheme

    check_scheme("--workdir", text)
    return text


class DescribeConfig(argparse.Action):
    """Prints what a field, a section or the whole config means, and ends the command."""

    def __call__(self, parser, namespace, values, option_string=None):
        page = values == "page"
        emit(config.make_page().rstrip() if page else config.describe_config(str(values)))
        parser.exit()


class PrintSchema(argparse.Action):
    """Prints the JSON schema of a config, and ends the command."""

    def __call__(self, parser, namespace, values, option_string=None):
        emit(json.dumps(config.make_schema(), indent=2))
        parser.exit()


def load_config(spec: str, overrides: list[str]) -> config.Config:
    """The Config of `path.py[:argument]` with `--config.section.key=value` overrides.

    Raises UsageError for a file or an override that cannot be used.
    """
    return apply_overrides(read_config_file(spec), overrides)


def apply_overrides(values: dict, overrides: list[str]) -> config.Config:
    """The Config of nested `values` with `--config.section.key=value` flags.

    Raises UsageError with a line for each fault, of the flags and of the values.
    """
    faults = []
    for key, text in split_overrides(overrides):
        try:
            config.override(values, key, text)
        except UsageError as error:
            faults += error.args
    try:
        made = config.from_dict(values)
    except UsageError as error:
        faults += error.args
    if faults:
        raise UsageError(*faults)
    return made


def describe_overrides(spec: str, overrides: list[str]) -> str:
    """What the overrides change of the file's own values: "key = value (preset: value)" a line.

    The text is "" if the file's own values make no config.
    """
    values = read_config_file(spec)
    try:
        preset = config.from_dict(values)
    except UsageError:
        return ""
    changed = config.changes(preset, apply_overrides(values, overrides))
    return "\n".join(f"{key} = {new!r} (preset: {old!r})" for key, old, new, _ in changed)


def read_config_file(spec: str) -> dict[str, Any]:
    """The nested values that `path.py[:argument]` gives. Raises UsageError."""
    path, _, argument = spec.partition(":")
    file = Path(path)
    check_file(spec, file)

    sys.path.insert(0, str(file.resolve().parent))  # A config may import its neighbours.
    try:
        module = run_file(file)
        if not hasattr(module, "get_config"):
            raise UsageError(f"--config={spec}: the file has no get_config()")

        with quiet_stdout():
            values = module.get_config(argument) if argument else module.get_config()
        if not isinstance(values, ConfigDict):
            kind = type(values).__name__
            raise UsageError(f"--config={spec}: get_config() gives {kind}, not a ConfigDict")
        return values.to_dict()
    except UsageError:
        raise
    except ValueError as error:  # A config refuses its argument with one.
        raise UsageError(f"--config={spec}: {plain(error)}") from None
    except (Exception, SystemExit) as error:  # A file that is no config may do anything.
        why = f"{type(error).__name__}: {plain(error)}"
        raise UsageError(f"--config={spec}: cannot be read as a config: {why}") from None
    finally:
        sys.path.pop(0)


def check_file(spec: str, file: Path) -> None:
    """Raises UsageError, naming the configs that are near, if `file` is no Python file."""
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "no such file"
        near = sorted(str(path) for path in file.parent.glob("*.py"))
        there = f"; there are {', '.join(near)}" if near else ""
        raise UsageError(f"--config={spec}: {problem}{there}")
    if file.suffix != ".py":
        raise UsageError(
            f"--config={spec}: is no Python file; expected FILE.py, or FILE.py:VARIANT"
        )


def run_file(file: Path) -> ModuleType:
    """The module that the file's code makes."""
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    # The name ends with .py, so that Python knows a loader.
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    with quiet_stdout():
        module_spec.loader.exec_module(module)
    return module


def quiet_stdout() -> contextlib.AbstractContextManager:
    """Sends prints to standard error, because standard output is the command's own."""
    return contextlib.redirect_stdout(sys.stderr)


def split_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """`["--config.a.b=1", "--config.c", "2"]` -> [("a.b", "1"), ("c", "2")].

    Raises UsageError for anything else.
    """
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            way_out = "overrides look like --config.optim.learning_rate=3e-4"
            if flag.startswith(("--processes", "--nodes", "--devices_per_process")):
                way_out = (
                    "several processes are started by gpt-jax launch local --processes=2 train …"
                )
            raise UsageError(f"unknown argument {flag!r}; {way_out}")

        key, equals, text = flag.removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"{flag}: needs a value, as in {flag}=…")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs
