"""Text from a model: prompts, the loop with a KV cache, streaming.

One row is one sample of one prompt. Prompts are right-padded to a bucket of lengths. `_start`
therefore compiles once for each bucket of (rows, prompt, total), and `_next` once for each of
(rows, total). The loop runs one jitted step a token. It fetches each token while the next one is
being computed.

Shapes: B rows, T prompt tokens, D embed, V rows of the embedding.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.data import StreamDecoder, Tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.infer.sampling import Knobs, Sampling, check, sample
from gpt_jax.model import (
    KERNELS,
    MULTIPLIED,
    Transformer,
    choose_kernel,
    describe_parameter,
    join_path,
    make_cache,
    make_problem,
)

# The smallest bucket in tokens. It is more than one, because the model takes a single token for a
# decoding step.
SMALLEST_BUCKET = 16


class Completion(NamedTuple):
    """A finished row.

    `tokens` are the new ones without the end-of-text token. `text` is their text up to the stop
    string. `finish` is length, stop or eot.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    text: str
    finish: str


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
    logits = Transformer(model, compute).apply({"params": params}, hidden, method="unembed")
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


# ---- text ----


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Finds the place where `text` is cut, or None without a stop string in it.

    The text is cut at the start of the stop string that is complete first, and of several at the
    longest. It does not matter how the text was split into tokens.
    """
    matches = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(matches)[1] if matches else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Counts the last characters that may be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


class _Row:
    """One row's text: it takes tokens, and gives the characters that may be shown.

    `finish` is None until the row ends.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], limit: int):
        self._decoder = StreamDecoder(tokenizer)
        self._eot = tokenizer.eot
        self._stops = stops
        self._limit = limit
        self._waiting = ""  # characters that may be the beginning of a stop string

        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None

    def push(self, token: int) -> str:
        """Takes one token, and returns the characters that it makes certain."""
        if token == self._eot:
            shown = self._end("eot")
        else:
            self.tokens.append(token)
            shown = self._take(self._decoder.feed(token))
            if self.finish is None and len(self.tokens) == self._limit:
                shown += self._end("length")
        self.text += shown
        return shown

    def _take(self, text: str) -> str:
        """Takes text, and returns what can be no part of a stop string."""
        text = self._waiting + text
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.finish = "stop"
        else:
            cut = len(text) - held_back(text, self._stops)

        self._waiting = text[cut:]
        return text[:cut]

    def _end(self, reason: str) -> str:
        """Ends the row, and returns the rest of its text."""
        shown = self._take(self._decoder.flush())
        if self.finish is None:
            self.finish = reason
            shown += self._waiting
        return shown


# ---- the loop ----


def bucket(size: int, smallest: int = 1) -> int:
    """Returns the first power of two that is at least `size`, and at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def fit_prompt(
    number: int, text: str, tokenizer: Tokenizer, context: int, sampling: Sampling, report
) -> np.ndarray:
    """Encodes a prompt: at least one id, with room for a new token in the context.

    An empty prompt starts from the end-of-text token. With `sampling.truncate` a prompt that fills
    the context keeps its last tokens. This leaves room for `max_new_tokens`, but the prompt keeps
    at least half the context.

    Raises UsageError if the prompt fills the context without `truncate`. Raises UsageError if it
    is empty and the tokenizer has no end-of-text token.
    """
    ids = tokenizer.encode(text)
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


def _cast_multiplied(params, dtype: str):
    """Casts matmul weights once to the dtype in which they are multiplied.

    The numbers do not change. A step reads half the bytes.
    """
    if dtype == "float32":
        return params

    def cast(keys, x):
        role = describe_parameter(join_path(keys)).role
        return x.astype(dtype) if role in MULTIPLIED else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _host_arrays(rows, prompts, sampling: Sampling, vocab: int, context: int):
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
        # Without it, two prompts of one call would be continued by the same random numbers.
        digests[b] = zlib.crc32(np.asarray(ids, np.int32).tobytes())

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


def _prompt_kernel(model: config.Model, compute: config.Compute, length: int) -> str:
    """Chooses the attention kernel for prompts of `length`.

    This is the kernel of the config where it can do that length, and else the choice of `auto`.
    Training may have another length: splash wants multiples of 128.
    """
    problem = make_problem(model, compute.dtype, length, jax.default_backend())
    if compute.kernel != "auto" and not KERNELS[compute.kernel].cannot(problem):
        return compute.kernel
    return choose_kernel("auto", problem)[0]


def _stream_rows(model, compute, params, tokenizer, prompts, rows, sampling) -> Iterator[Piece]:
    """Yields the pieces of one batch of rows (prompt, sample)."""
    context = model.max_seq
    tokens, lengths, seen, knobs = _host_arrays(rows, prompts, sampling, model.vocab, context)
    sizes = [len(prompts[prompt]) for prompt, _ in rows]
    limits = [min(sampling.max_new_tokens, context - size) for size in sizes]
    longest = max(size + limit for size, limit in zip(sizes, limits, strict=True))
    length = min(bucket(longest, SMALLEST_BUCKET), context)
    kernel = _prompt_kernel(model, compute, tokens.shape[1])
    static = {
        "model": model,
        "compute": dataclasses.replace(compute, kernel=kernel),
        "vocab": tokenizer.vocab,
    }

    live = {b: _Row(tokenizer, sampling.stop, limit) for b, limit in enumerate(limits)}
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
            completion = _complete(live[b], *rows[b])
            if completion:
                del live[b]
            if text or completion:
                prompt, sample_number = rows[b]
                yield Piece(prompt * sampling.num_samples + sample_number, text, completion)
        if not live:
            return


def _complete(row: _Row, prompt: int, sample_number: int) -> Completion | None:
    """Makes the completion of a row that has ended."""
    if row.finish is None:
        return None
    return Completion(prompt, sample_number, tuple(row.tokens), row.text, row.finish)


def stream_text(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    report: Callable[[str], None],
    max_rows: int = 32,
) -> Iterator[Piece]:
    """Yields text while it is drawn: `num_samples` rows for each prompt, `max_rows` at a time.

    `model` must be resolved. `params` may live on the current mesh, whatever its shape. `report`
    gets one line for each prompt that was cut, or that reaches the end of the context early.

    Raises UsageError if a sampling value is out of range. Raises UsageError if a prompt does not
    fit, or the tokenizer cannot encode it. Both happen before this function returns.
    """
    check(sampling)
    model = dataclasses.replace(model, dropout=0.0, attention_dropout=0.0)
    compute = dataclasses.replace(compute, remat="none")
    fitted = [
        fit_prompt(i + 1, text, tokenizer, model.max_seq, sampling, report)
        for i, text in enumerate(prompts)
    ]
    rows = [(p, s) for p in range(len(fitted)) for s in range(sampling.num_samples)]

    # A token goes through all layers on every stage of a pipeline.
    if sharding.axis_size("pipeline") > 1:
        params = params | {"blocks": sharding.off_stages(params["blocks"])}
    params = _cast_multiplied(params, compute.dtype)

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
    prompts: Sequence[str],
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
