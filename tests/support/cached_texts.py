"""Texts for the tests of the token cache, and calls of it."""

from gpt_jax import config
from gpt_jax.data.tokenizers.spec import resolve_tokenizer
from gpt_jax.data.tokens import cache

WORDS = "the cat sat on the mat and 我是猫 looked at 👍 it all day long\n"


def data_for(folder, **changes):
    """The settings of the texts in `folder`, whose tokens are cached beside them."""
    return config.Data(
        **{"path": (str(folder / "text"),), "cache": str(folder / "cache"), "workers": 2, **changes}
    )


def ids(tokens):
    """All ids of a side."""
    return tokens.ids(0, tokens.size)


def prepare(data, report):
    """The tokens of `data`, with the tokenizer that it names."""
    return cache.prepare(data, resolve_tokenizer(data.tokenizer), report)


def quiet(_):
    """Takes a line and says nothing."""


def texts(tokens, tokenizer):
    """The documents of a side, decoded."""
    return [
        tokenizer.decode(tokens.ids(a, b))
        for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)
    ]
