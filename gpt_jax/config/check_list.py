"""The lines about fields that do not agree, as checks collect them."""

from typing import Any

from gpt_jax.config.fields import Config


class Checks:
    """Collects a line about each field that does not agree with others."""

    def __init__(self, config: Config):
        self.config = config
        self.lines: list[str] = []

    def need(self, is_right: bool, path: str, way_out: str) -> None:
        """Adds a line about the field or entry at `path` if `is_right` is false."""
        if is_right:
            return

        value: Any = self.config
        for name in path.replace("[", ".").replace("]", "").split("."):
            value = value[int(name)] if name.isdecimal() else getattr(value, name)
        self.lines.append(f"config.{path} = {value!r}: {way_out}")
