"""The parser of every command's flags."""

import argparse
import math
from typing import NoReturn

from gpt_jax.config import Checkpoint
from gpt_jax.errors import UsageError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default to a flag's help, if there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors: one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def check_number(flag: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises UsageError for a flag's value that is not in `low` to `high`, or is no number."""
    if not low <= value <= high:
        bounds = f"{low} or more" if high == math.inf else f"{low} to {high:,}"
        raise UsageError(f"{flag}={value}: expected {bounds}")


def add_checkpoint_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that ask one model: which one, and where its weights are."""
    flags.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir, its checkpoints, one step, a URL of these, or a directory of Hugging Face",
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    add_mirror_flag(flags)
    add_base_flag(flags)


def add_base_flag(flags: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that read weights, and so those beneath adapters."""
    flags.add_argument(
        "--base",
        default="",
        metavar="DIR[@STEP]",
        help="where the weights beneath adapters are now, if they have moved",
    )


def add_mirror_flag(flags: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that read checkpoints."""
    flags.add_argument(
        "--mirror",
        default=Checkpoint().mirror,
        metavar="DIR",
        help="the folder of this machine for copies of checkpoints at a URL",
    )
