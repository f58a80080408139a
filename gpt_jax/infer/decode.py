"""Text from a model: prompts, the loop with a KV cache, streaming.

One row is one sample of one prompt. Prompts are right-padded to a bucket of lengths. `_start`
therefore compiles once for each bucket of (rows, prompt, total), and `_next` once for each of
(rows, total). The loop runs one jitted step a token. It fetches each token while the next one is
being computed.

Shapes: B rows, T prompt tokens, D embed, V rows of the embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.data import Tokenizer
from gpt_jax.infer.prompts import SMALLEST_BUCKET, bucket, fit_prompt, make_arrays
from gpt_jax.infer.ready import make_ready, with_kernel
from gpt_jax.infer.sampling import sample
from gpt_jax.infer.settings import Sampling
from gpt_jax.infer.text import Completion, Row, complete
from gpt_jax.model import Transformer, make_cache


class Piece(NamedTuple):
    """The characters that one row gained. A row's last piece carries its completion.

    `row` is prompt * num_samples + sample.
    """

    row: int
    text: str
    completion: Completion | None


# ---- the two programs ----


class State(NamedTuple):
    """What one step hands to the next.

    The cache has `lengths` [B] tokens, and `tokens` [B] come next. `seen` [B, V] tells which tokens
    a row has.
    """

    cache: dict
    tokens: jax.Array
    lengths: jax.Array
    seen: jax.Array


def _pick(params, hidden, cache, lengths, seen, knobs, model, compute, vocab):
    """Draws the next tokens from hidden [B, 1, D] -> (State, the tokens [B] on every device)."""
    logits: Any = Transformer(model, compute).apply({"params": params}, hidden, method="unembed")
    # The sampler sees a row's whole vocabulary.
    logits = sharding.constrain(logits, "batch", None, None)[:, 0]

    rows = ("batch",)
    table = ("batch", None)
    run = sharding.run_local(partial(sample, vocab=vocab), (table, rows, rows, table), rows)
    tokens = run(logits, lengths, knobs, seen)
    seen = seen | (jnp.arange(seen.shape[1]) == tokens[:, None])
    return State(cache, tokens, lengths, seen), sharding.constrain(tokens, None)


def _place(tree):
    """Lays out host arrays [B, …], the same in every process, over the batch axes."""

    def place(x):
        return sharding.constrain(x, "batch", *[None] * (x.ndim - 1))

    return jax.tree.map(place, tree)


@partial(jax.jit, static_argnames=("model", "compute", "vocab", "length"))
@sharding.using_rules(sharding.WHOLE_ROWS)
def _start(
    params,
    tokens,
    lengths,
    seen,
    knobs,
    *,
    model: config.Model,
    compute: config.Compute,
    vocab: int,
    length: int,
):
    """Reads prompts [B, T] into a new cache of `length` tokens, and draws the first new tokens.

    The first `lengths` [B] tokens of a prompt are real.
    """
    tokens, lengths, seen, knobs = _place((tokens, lengths, seen, knobs))
    place = jnp.arange(tokens.shape[1])[None]
    batch = {"tokens": tokens, "segment": (place < lengths[:, None]).astype(jnp.int32)}
    cache = make_cache(model, compute, tokens.shape[0], length)
    hidden, cache = Transformer(model, compute).apply(
        {"params": params}, batch, cache, lengths, method="step"
    )

    is_last = place == lengths[:, None] - 1
    last = jnp.where(is_last[..., None], hidden, 0).sum(1, keepdims=True)
    return _pick(params, last, cache, lengths, seen, knobs, model, compute, vocab)


@partial(jax.jit, static_argnames=("model", "compute", "vocab"), donate_argnames="state")
@sharding.using_rules(sharding.WHOLE_ROWS)
def _next(params, state: State, knobs, *, model: config.Model, compute: config.Compute, vocab: int):
    """Draws one more token a row.

    Rows that have ended run along. Their positions stay inside the context.
    """
    position = jnp.minimum(state.lengths, model.max_seq - 1)[:, None]
    batch = {"tokens": state.tokens[:, None], "position": position}
    hidden, cache = Transformer(model, compute).apply(
        {"params": params}, batch, state.cache, state.lengths, method="step"
    )
    return _pick(
        params, hidden, cache, state.lengths + 1, state.seen, _place(knobs), model, compute, vocab
    )


# ---- the loop ----


def _stream_rows(model, compute, params, tokenizer, prompts, rows, sampling) -> Iterator[Piece]:
    """Yields the pieces of one batch of rows (prompt, sample)."""
    context = model.max_seq
    tokens, lengths, seen, knobs = make_arrays(rows, prompts, sampling, model.vocab, context)
    sizes = [len(prompts[prompt]) for prompt, _ in rows]
    limits = [min(sampling.max_new_tokens, context - size) for size in sizes]
    longest = max(size + limit for size, limit in zip(sizes, limits, strict=True))
    length = min(bucket(longest, SMALLEST_BUCKET), context)
    static = {
        "model": model,
        "compute": with_kernel(model, compute, tokens.shape[1]),
        "vocab": tokenizer.vocab,
    }

    # An empty prompt is the end-of-text token alone.
    starts = [prompts[prompt].tolist() == [tokenizer.eot] for prompt, _ in rows]
    live = {b: Row(tokenizer, sampling.stop, limit, starts[b]) for b, limit in enumerate(limits)}
    state, next_tokens = _start(params, tokens, lengths, seen, knobs, length=length, **static)
    for steps_left in range(max(limits) - 1, -1, -1):
        ready = next_tokens
        # The next step is under way before the host waits for the tokens of this one.
        if steps_left:
            state, next_tokens = _next(params, state, knobs, **static)

        for b, token in enumerate(np.asarray(ready)[: len(rows)].tolist()):
            if b not in live:
                continue
            text = live[b].push(token)
            completion = complete(live[b], *rows[b])
            if completion:
                del live[b]
            if text or completion:
                prompt, sample_number = rows[b]
                yield Piece(prompt * sampling.num_samples + sample_number, text, completion)
        if not live:
            return


def stream_text(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | np.ndarray],
    sampling: Sampling,
    report: Callable[[str], None],
    max_rows: int = 32,
) -> Iterator[Piece]:
    """Yields text while it is drawn: `num_samples` rows for each prompt, `max_rows` at a time.

    `model` must be resolved. Its experts take all of their tokens, see `ready.drop_capacity`.
    `params` may live on the current mesh, whatever its shape. A prompt is a text, or its ids [T].
    `report` gets one line for each prompt that was cut, or that reaches the end of the context
    early.

    Raises UsageError if a prompt does not fit, or if the tokenizer cannot encode it. This happens
    before the function returns.
    """
    # A token goes through all layers on every stage of a pipeline.
    if sharding.axis_size("pipeline") > 1:
        params = params | {"blocks": sharding.off_stages(params["blocks"])}
    model, compute, params = make_ready(model, compute, params, report)
    fitted = [
        fit_prompt(i + 1, text, tokenizer, model.max_seq, sampling, report)
        for i, text in enumerate(prompts)
    ]
    rows = [(p, s) for p in range(len(fitted)) for s in range(sampling.num_samples)]

    groups = (rows[i : i + max_rows] for i in range(0, len(rows), max_rows))
    return (
        piece
        for group in groups
        for piece in _stream_rows(model, compute, params, tokenizer, fitted, group, sampling)
    )


def generate(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | np.ndarray],
    sampling: Sampling,
    report: Callable[[str], None],
    max_rows: int = 32,
) -> list[Completion]:
    """Draws text to its end: one Completion for each row, in the order of rows.

    Arguments and errors are those of `stream_text`.
    """
    pieces = stream_text(model, compute, params, tokenizer, prompts, sampling, report, max_rows)
    by_row = {piece.row: piece.completion for piece in pieces if piece.completion}
    return [by_row[row] for row in sorted(by_row)]
