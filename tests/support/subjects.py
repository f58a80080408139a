"""Models made by hand, for tests of scores: bytes, each of which depends on the one before."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import Tokenizer, make_byte_tokenizer
from gpt_jax.evals import Subject
from gpt_jax.model.transformer import abstract_params

CONTEXT = 64
IDS = 257  # of the byte tokenizer


def make_subject(table: np.ndarray, tokenizer: Tokenizer | None = None) -> Subject:
    """A bigram model: after the id i, the id j has the probability table[i, j] [V, V].

    Its blocks add nothing, so that the logits are the row of the embedding times the head.
    """
    size = len(table)
    values = dict(layers=1, embed=size, heads=1, mlp=4, vocab=size, max_seq=CONTEXT)
    values |= dict(position="none", tied=False, bias=False, final_norm=False)
    model = config.resolve(config.Config(model=config.from_dict(values, config.Model))).model

    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(model))
    params["embed"]["table"] = jnp.eye(size)
    params["head"]["kernel"] = jnp.log(jnp.asarray(table, jnp.float32))
    compute = config.Compute(kernel="reference")
    return Subject(model, compute, params, tokenizer or make_byte_tokenizer())


def draw_table(seed: int = 0) -> np.ndarray:
    """Probabilities [IDS, IDS] of a bigram model."""
    return np.random.default_rng(seed).dirichlet(np.full(IDS, 0.5), size=IDS) * 0.9 + 0.1 / IDS


def make_chain(text: str, table: np.ndarray) -> np.ndarray:
    """`table` where each byte of `text` is by far the likeliest after the one before it.

    The first byte follows the end of a text. No byte may occur twice.
    """
    ids = [IDS - 1, *text.encode()]
    assert len(set(ids)) == len(ids)
    changed = table.copy()
    changed[ids[:-1]] *= 0.01
    changed[ids[:-1], ids[1:]] += 0.99
    return changed


def read_off(table: np.ndarray, context: str, continuation: str) -> float:
    """The log-probability of a continuation by the table. White space may move between them."""
    ids = [*(context.encode() or [IDS - 1]), *continuation.encode()]
    count = len(continuation.encode())
    return float(np.log(table[ids[-count - 1 : -1], ids[-count:]]).sum())
