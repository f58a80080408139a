"""What commands share: flags, config files, and the runtime (devices, processes, allocator)."""

import argparse

from gpt_jax.errors import UsageError


class Flags(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors: one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message):
        raise UsageError(f"{message}; see {self.prog} --help")
