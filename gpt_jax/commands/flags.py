"""The parser of every command's flags."""

import argparse
from typing import NoReturn

from gpt_jax.errors import UsageError


class Flags(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors: one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")
