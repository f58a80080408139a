"""Text from a model: prompts, the KV-cached loop, streaming (called by evals and the generate
command).

Shapes: B rows, T prompt tokens, D embed, V rows of the embedding. One row is one sample of one
prompt. Prompts are right-padded to a shape bucket, so that `_start` compiles once per (rows,
prompt, total) bucket and `_next` once per (rows, total). The loop runs one jitted step a token and
fetches each token while the next one is being computed.
"""

import dataclasses
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
from gpt_jax.model import KERNELS, Transformer, choose_kernel, make_cache, make_problem

SMALLEST_BUCKET = (
    16  # tokens; more than one, because a single token is a decoding step to the model
)


class Completion(NamedTuple):
    """A finished row: new `tokens` (the end-of-text token left out), their `text` up to the stop
    string, and `finish`: length, stop or eot."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    text: str
    finish: str


class Piece(NamedTuple):
    """Whole characters that `row` = prompt * num_samples + sample gained; its last piece carries
    the completion."""

    row: int
    text: str
    completion: Completion | None


# ---- the two programs ----


class State(NamedTuple):
    """Between two steps: `lengths` [B] tokens are in the cache, `tokens` [B] come next, `seen`
    [B, V]."""

    cache: dict
    tokens: jax.Array
    lengths: jax.Array
    seen: jax.Array


def _pick(params, hidden, cache, lengths, seen, knobs, model, compute, vocab):
    """hidden [B, 1, D] of the last tokens -> (State, the new tokens [B] on every device)."""
    logits = Transformer(model, compute).apply({"params": params}, hidden, method="unembed")
    rows, table = ("batch",), ("batch", None)
    logits = sharding.constrain(logits, "batch", None, None)[
        :, 0
    ]  # the sampler sees a row's whole vocabulary
    run = sharding.run_local(partial(sample, vocab=vocab), (table, rows, rows, table), rows)
    tokens = run(logits, lengths, knobs, seen)
    seen = seen | (jnp.arange(seen.shape[1]) == tokens[:, None])
    return State(cache, tokens, lengths, seen), sharding.constrain(tokens, None)


def _place(tree):
    """Host arrays [B, …], the same in every process, laid out over the batch axes."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


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
    """Prompts [B, T], of which `lengths` tokens are real, into a new cache of `length` tokens;
    the first new tokens."""
    tokens, lengths, seen, knobs = _place((tokens, lengths, seen, knobs))
    place = jnp.arange(tokens.shape[1])[None]
    batch = {"tokens": tokens, "segment": (place < lengths[:, None]).astype(jnp.int32)}
    cache = make_cache(model, compute, tokens.shape[0], length)
    hidden, cache = Transformer(model, compute).apply(
        {"params": params}, batch, cache, lengths, method="step"
    )
    last = jnp.where((place == lengths[:, None] - 1)[..., None], hidden, 0).sum(1, keepdims=True)
    return _pick(params, last, cache, lengths, seen, knobs, model, compute, vocab)


@partial(jax.jit, static_argnames=("model", "compute", "vocab"), donate_argnames="state")
@sharding.using_rules(sharding.WHOLE_ROWS)
def _next(params, state: State, knobs, *, model: config.Model, compute: config.Compute, vocab: int):
    """One more token a row. Rows that have ended run along, their positions held inside the
    context."""
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
    """Where `text` is cut: the start of the stop string that is complete first (the longest of
    those), however the text was split into tokens. None without one."""
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


class _Row:
    """One row's text: tokens in, characters that may be shown out. `finish` is None until the
    row ends."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], limit: int):
        self._decoder, self._eot, self._stops, self._limit = (
            StreamDecoder(tokenizer),
            tokenizer.eot,
            stops,
            limit,
        )
        self._waiting, self.tokens, self.text, self.finish = "", [], "", None

    def push(self, token: int) -> str:
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
        text = self._waiting + text
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.finish = "stop"
        else:
            cut = len(text) - held_back(text, self._stops)
        self._waiting = text[cut:]
        return text[:cut]

    def _end(self, reason: str) -> str:
        shown = self._take(self._decoder.flush())
        if self.finish is None:
            self.finish = reason
            shown += self._waiting
        return shown


# ---- the loop ----


def bucket(size: int, smallest: int = 1) -> int:
    """The first power of two, from `smallest` on, that holds `size`."""
    return max(smallest, 1 << (size - 1).bit_length())


def fit_prompt(
    number: int, text: str, tokenizer: Tokenizer, context: int, sampling: Sampling, report
) -> np.ndarray:
    """The prompt's ids, at least one, with room for a new token in the context.

    An empty prompt starts from the end-of-text token. A prompt that fills the context raises
    UsageError, or with `sampling.truncate` keeps its last tokens, leaving room for
    `max_new_tokens` but at most half the context."""
    ids = tokenizer.encode(text)
    if not len(ids):
        if tokenizer.eot is None:
            raise UsageError(
                f"prompt {number} is empty, and the {tokenizer.name} tokenizer has no end-of-text token "
                "to start from; give a prompt of at least one character"
            )
        ids = np.array([tokenizer.eot], np.int32)
    if len(ids) >= context:
        keep = max(context - sampling.max_new_tokens, context // 2)
        if not sampling.truncate or not keep:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens and the model's context holds {context}, new ones "
                f"included; shorten it to {context - 1} or fewer, or keep its last tokens with --truncate"
            )
        report(
            f"prompt {number}: kept the last {keep} of {len(ids)} tokens, cut the first {len(ids) - keep} (the "
            f"context holds {context}, new ones included)"
        )
        ids = ids[-keep:]
    if len(ids) + sampling.max_new_tokens > context:
        report(
            f"prompt {number}: stops after {context - len(ids)} new tokens, where the context of {context} is full"
        )
    return ids


def _kernels_once(params, dtype: str):
    """Matmul weights in the dtype in which they are multiplied anyway: the same numbers, read at
    half the bytes."""

    def cast(path, x):
        return x.astype(dtype) if path[-1].key == "kernel" else x

    return params if dtype == "float32" else jax.tree_util.tree_map_with_path(cast, params)


def _host_arrays(rows, prompts, sampling: Sampling, vocab: int, context: int):
    """(tokens [B, T], lengths [B], seen [B, vocab], Knobs) for `rows` of (prompt, sample),
    padded to the bucket."""
    shards = sharding.count_parts("batch")
    B = shards * bucket(-(-len(rows) // shards))
    T = min(bucket(max(len(prompts[p]) for p, _ in rows), SMALLEST_BUCKET), context)
    tokens = np.zeros((B, T), np.int32)
    lengths, seen, index = np.ones(B, np.int32), np.zeros((B, vocab), bool), np.zeros(B, np.int32)
    for b, (p, s) in enumerate(rows):
        ids = prompts[p]
        tokens[b, : len(ids)], lengths[b], seen[b, ids], index[b] = ids, len(ids), True, s

    def full(value, dtype):
        return np.full(B, value, dtype)

    knobs = Knobs(
        full(sampling.seed, np.uint32),
        index,
        full(sampling.temperature, np.float32),
        full(sampling.top_k, np.int32),
        full(sampling.top_p, np.float32),
        full(sampling.min_p, np.float32),
        full(sampling.repetition_penalty, np.float32),
    )
    return tokens, lengths, seen, knobs


def _prompt_kernel(model: config.Model, compute: config.Compute, length: int) -> str:
    """The model's own attention kernel where it can do a prompt of `length`, which its choice
    did not ask (splash wants multiples of 128); else the choice of `auto`."""
    problem = make_problem(model, compute.dtype, length, jax.default_backend())
    named = compute.kernel != "auto" and not KERNELS[compute.kernel].cannot(problem)
    return compute.kernel if named else choose_kernel("auto", problem)[0]


def _stream_rows(model, compute, params, tokenizer, prompts, rows, sampling) -> Iterator[Piece]:
    """The pieces of one batch of rows (prompt, sample)."""
    context = model.max_seq
    tokens, lengths, seen, knobs = _host_arrays(rows, prompts, sampling, model.vocab, context)
    limits = [min(sampling.max_new_tokens, context - len(prompts[p])) for p, _ in rows]
    longest = max(len(prompts[p]) + limit for (p, _), limit in zip(rows, limits))
    length = min(bucket(longest, SMALLEST_BUCKET), context)
    kernel = _prompt_kernel(model, compute, tokens.shape[1])
    static = {
        "model": model,
        "compute": dataclasses.replace(compute, kernel=kernel),
        "vocab": tokenizer.vocab,
    }
    live = {b: _Row(tokenizer, sampling.stop, limit) for b, limit in enumerate(limits)}
    state, ready = _start(params, tokens, lengths, seen, knobs, length=length, **static)
    for left in range(max(limits) - 1, -1, -1):
        fetched = ready
        if left:  # under way before the host waits for the token before it
            state, ready = _next(params, state, knobs, **static)
        for b, token in enumerate(np.asarray(fetched)[: len(rows)].tolist()):
            if b not in live:
                continue
            row, text = live[b], live[b].push(token)
            prompt, sample = rows[b]
            done = row.finish and Completion(
                prompt, sample, tuple(row.tokens), row.text, row.finish
            )
            if done:
                del live[b]
            if text or done:
                yield Piece(prompt * sampling.num_samples + sample, text, done)
        if not live:
            return


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
    """Text as it comes, `num_samples` rows for each prompt, `max_rows` at a time. Input is checked
    before this returns.

    `model` is resolved (no field left to derive); `params` may live on the current mesh, whatever
    its shape. `report` gets one line for each prompt that was cut or that reaches the end of the
    context early. Raises UsageError for sampling values out of range, a prompt that does not fit,
    or one that the tokenizer cannot encode.
    """
    check(sampling)
    model = dataclasses.replace(model, dropout=0.0, attention_dropout=0.0)
    compute = dataclasses.replace(compute, remat="none")
    fitted = [
        fit_prompt(i + 1, text, tokenizer, model.max_seq, sampling, report)
        for i, text in enumerate(prompts)
    ]
    rows = [(p, s) for p in range(len(fitted)) for s in range(sampling.num_samples)]
    if sharding.axis_size("pipeline") > 1:  # a token goes through all layers on every stage
        params = params | {"blocks": sharding.off_stages(params["blocks"])}
    params = _kernels_once(params, compute.dtype)
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
    """`stream` to its end: one Completion for each row, in the order of rows."""
    pieces = stream_text(model, compute, params, tokenizer, prompts, sampling, report, max_rows)
    return [
        done
        for _, done in sorted((piece.row, piece.completion) for piece in pieces if piece.completion)
    ]
