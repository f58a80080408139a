"""Prompts as arrays: encoded, fitted into the context, and padded to a bucket.

Shapes: B rows, T prompt tokens.
"""

import zlib

import numpy as np

from gpt_jax import sharding
from gpt_jax.data import Tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.infer.sampling import Knobs
from gpt_jax.infer.settings import Sampling

# The smallest bucket in tokens. It is more than one, because the model takes a single token for a
# decoding step.
SMALLEST_BUCKET = 16


def bucket(size: int, smallest: int = 1) -> int:
    """Returns the first power of two that is at least `size`, and at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def fit_prompt(
    number: int,
    prompt: str | np.ndarray,
    tokenizer: Tokenizer,
    context: int,
    sampling: Sampling,
    report,
) -> np.ndarray:
    """Encodes a prompt: at least one id, with room for a new token in the context.

    A prompt of ids is taken as it is.

    An empty prompt starts from the end-of-text token. With `sampling.truncate` a prompt that fills
    the context keeps its last tokens. This leaves room for `max_new_tokens`, but the prompt keeps
    at least half the context.

    Raises UsageError if the prompt fills the context without `truncate`. Raises UsageError if it
    is empty and the tokenizer has no end-of-text token.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not len(ids):
        if tokenizer.eot is None:
            raise UsageError(
                f"prompt {number} is empty, and the {tokenizer.name} tokenizer has no end-of-text "
                "token to start from; give a prompt of at least one character"
            )
        ids = np.array([tokenizer.eot], np.int32)

    if len(ids) >= context:
        keep = max(context - sampling.max_new_tokens, context // 2)
        if not sampling.truncate or not keep:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens and the model's context holds {context}, "
                f"new ones included; shorten it to {context - 1} or fewer, or keep its last tokens "
                "with --truncate"
            )
        report(
            f"prompt {number}: kept the last {keep} of {len(ids)} tokens, cut the first "
            f"{len(ids) - keep} (the context holds {context}, new ones included)"
        )
        ids = ids[-keep:]

    if len(ids) + sampling.max_new_tokens > context:
        report(
            f"prompt {number}: stops after {context - len(ids)} new tokens, where the context of "
            f"{context} is full"
        )
    return ids


def digest_prompt(ids) -> int:
    """A number of 32 bits for a prompt. It is part of the key of the random numbers.

    Without it two prompts of one call would be continued by the same random numbers.
    """
    return zlib.crc32(np.asarray(ids, np.int32).tobytes())


def make_arrays(rows, prompts, sampling: Sampling, vocab: int, context: int):
    """Makes the arrays of one batch of rows (prompt, sample), padded to its bucket.

    Returns (tokens [B, T], lengths [B], seen [B, vocab], Knobs).
    """
    shards = sharding.count_parts("batch")
    B = shards * bucket(-(-len(rows) // shards))
    longest = max(len(prompts[p]) for p, _ in rows)
    T = min(bucket(longest, SMALLEST_BUCKET), context)

    tokens = np.zeros((B, T), np.int32)
    lengths = np.ones(B, np.int32)
    seen = np.zeros((B, vocab), bool)
    samples = np.zeros(B, np.int32)
    digests = np.zeros(B, np.uint32)
    for b, (prompt, sample_number) in enumerate(rows):
        ids = prompts[prompt]
        tokens[b, : len(ids)] = ids
        lengths[b] = len(ids)
        seen[b, ids] = True
        samples[b] = sample_number
        digests[b] = digest_prompt(ids)

    def fill(value, dtype):
        return np.full(B, value, dtype)

    knobs = Knobs(
        fill(sampling.seed, np.uint32),
        samples,
        digests,
        fill(sampling.temperature, np.float32),
        fill(sampling.top_k, np.int32),
        fill(sampling.top_p, np.float32),
        fill(sampling.min_p, np.float32),
        fill(sampling.repetition_penalty, np.float32),
    )
    return tokens, lengths, seen, knobs
