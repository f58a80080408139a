"""Who is asked."""

from typing import Any, NamedTuple

from gpt_jax import config
from gpt_jax.data import Tokenizer


class Subject(NamedTuple):
    """A trained model. `params` lie on the current mesh, and `model` is resolved."""

    model: config.Model
    compute: config.Compute
    params: Any
    tokenizer: Tokenizer
