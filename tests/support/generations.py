"""A tiny model of noise, prompts for it, and generation with it."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.infer.decode import generate
from gpt_jax.infer.sampling import Knobs
from gpt_jax.infer.settings import Sampling
from gpt_jax.infer.text import Completion
from gpt_jax.model.transformer import abstract_params

LETTERS = make_char_tokenizer("abcdefghijklmnopqrstuvwxyz012345")  # 32 ids, no end of text
PROMPTS = ["ab", "the5quick1brown2fox", "hello0w"]  # 2, 19 and 7 tokens
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
BASE = dict(layers=2, embed=16, heads=4, mlp=32, vocab=40, max_seq=48)
COMPUTE = config.Compute(kernel="reference")


def make_model(**changes) -> config.Model:
    """The tiny model with a few fields changed."""
    model = config.from_dict({**BASE, **changes}, config.Model)
    return config.resolve(config.Config(model=model)).model


@cache
def make_params(model: config.Model):
    """Parameters of noise, large enough that no most likely token is an accident of rounding.

    Projections that start at zero would hide the whole cache. Factors are near 1.
    """
    rng = np.random.default_rng(1)

    def one(path, leaf):
        factor = jax.tree_util.keystr(path, simple=True, separator="/").endswith(
            ("/scale", "residual/x")
        )
        return jnp.asarray(factor + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(model))


def silent(line: str) -> None:
    """Takes the lines of a call that must report nothing."""
    raise AssertionError(f"nothing to report, got {line!r}")


def run(
    model, prompts, sampling, tokenizer=LETTERS, report=silent, max_rows=32
) -> list[Completion]:
    """Completions of `prompts` by the model of noise."""
    return generate(
        model, COMPUTE, make_params(model), tokenizer, prompts, sampling, report, max_rows
    )


def knobs_of(rows, **values):
    """Settings of sampling for `rows` rows. What is not given changes no draw."""
    made = (
        dict(
            seed=0,
            sample=0,
            prompt=0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
        )
        | values
    )
    kinds = dict(seed=np.uint32, sample=np.int32, prompt=np.uint32, top_k=np.int32)

    return Knobs(
        **{
            k: np.broadcast_to(np.asarray(v, kinds.get(k, np.float32)), rows)
            for k, v in made.items()
        }
    )
