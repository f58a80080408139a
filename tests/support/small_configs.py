"""Configs with a few fields changed, and calls that must be refused."""

import pytest

from gpt_jax import config
from gpt_jax.config import from_dict
from gpt_jax.errors import UsageError


def refuses(call, *words):
    """`call()` raises UsageError in one line that holds every word."""
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def made(**sections):
    """A resolved Config for a tokenizer of 256 ids, with a few fields changed."""
    return config.resolve(from_dict(sections), 256)


def fault_lines(made_config) -> list[str]:
    """What `check` says on eight devices, a line for each fault."""
    with pytest.raises(UsageError) as caught:
        config.check(made_config, devices=8)
    return str(caught.value).split("\n")
