"""How likely a model holds given continuations.

Requests are sorted by length into buckets, which are the powers of two from 16 up to the context.
A bucket is one program. The head and its logits are run from the end of the text backwards, some
positions at a time, as far as the longest continuation of the batch. The device sends two numbers
for each token and never the logits.

Shapes: B rows, T tokens that are read, D embed, V rows of the embedding, S places that are scored
from a row's end backwards, C places of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.infer.prompts import SMALLEST_BUCKET, bucket
from gpt_jax.infer.ready import make_ready, with_kernel
from gpt_jax.infer.requests import Fitted, Request, check_ids, fit_request
from gpt_jax.model import Transformer

# Tokens of a batch for each part of the mesh that has rows of its own.
TOKENS = 1 << 14
# Logits that a device makes at once. In float32 they take 256 MiB.
LOGITS = 1 << 26
# The most places of a chunk. What a batch does not need is left out in chunks.
CHUNK = 32


class Score(NamedTuple):
    """What a model says of one continuation.

    `total` is the sum of `logprobs` in float64, in nats. `is_greedy` tells whether each token is
    the most likely one. `cut` counts the ids of the context that did not fit.
    """

    total: float
    logprobs: np.ndarray  # float32 [tokens of the continuation]
    is_greedy: bool
    cut: int


class Batch(NamedTuple):
    """Rows of one program, padded to it. `numbers` are the places of their requests."""

    numbers: list[int]
    tokens: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B]
    targets: np.ndarray  # int32 [B, S], from the last token backwards
    needed: int  # chunks
    chunk: int


# ---- the program ----


def _read(params, tokens, lengths, network: Transformer) -> jax.Array:
    """The last hidden states [B, T, D] of right-padded rows."""
    place = jnp.arange(tokens.shape[1])[None]
    segment = (place < lengths[:, None]).astype(jnp.int32)
    batch = {"tokens": tokens, "segment": segment}
    hidden: Any = network.apply({"params": params}, batch, method="features")
    return hidden[0]


def _turn_round(hidden, lengths, places: int) -> jax.Array:
    """The hidden states of each row from its last token backwards [B, S, D].

    Before its first token a row repeats it.
    """

    def turn(hidden, lengths):
        index = jnp.maximum(lengths[:, None] - 1 - jnp.arange(places), 0)
        return jnp.take_along_axis(hidden, index[..., None], axis=1)

    axes = ("batch", None, None)
    return sharding.run_local(turn, (axes, ("batch",)), axes)(hidden, lengths)


def _measure(logits, targets) -> tuple[jax.Array, jax.Array]:
    """(log-probability, whether it is the most likely) of targets [B, C] under [B, C, V].

    The first of several most likely ids counts. A comparison with an iota picks the target's
    logit, because a gather cannot read logits that are sharded over the vocabulary.
    """
    vocab = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    vocab = sharding.constrain(vocab, None, None, "vocab")
    at_target = jnp.where(vocab == targets[..., None], logits, 0.0).sum(-1)

    best = logits.max(-1, keepdims=True)
    first_best = jnp.where(logits == best, vocab, logits.shape[-1]).min(-1)
    return at_target - jax.nn.logsumexp(logits, axis=-1), first_best == targets


def _cut(x, chunk: int):
    """[B, S, …] -> [chunks, B, C, …]."""
    rest = x.shape[2:]
    shape = (x.shape[0], x.shape[1] // chunk, chunk, *rest)
    return jnp.moveaxis(sharding.reshape(x, shape, "batch", None, None, *[None] * len(rest)), 1, 0)


@partial(jax.jit, static_argnames=("model", "compute", "chunk"))
@sharding.using_rules(sharding.WHOLE_ROWS)
def _score(
    params,
    tokens,
    lengths,
    targets,
    needed,
    *,
    model: config.Model,
    compute: config.Compute,
    chunk: int,
):
    """(log-probabilities float32, greedy or not) of targets [B, S], on every device.

    Chunks after the first `needed` have no result.
    """
    tokens = sharding.constrain(tokens, "batch", None)
    lengths = sharding.constrain(lengths, "batch")
    targets = sharding.constrain(targets, "batch", None)
    network = Transformer(model, compute)
    hidden = _turn_round(_read(params, tokens, lengths, network), lengths, targets.shape[1])
    head: Any = network.apply({"params": params}, hidden.dtype, method="output")

    def measure(hidden, targets):
        logits: Any = network.apply({"params": params}, head, hidden, method="logits")
        return _measure(logits, targets)

    def skip(hidden, targets):
        shape = targets.shape
        nothing = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
        return tuple(sharding.constrain(x, "batch", None) for x in nothing)

    def run_chunk(number, columns):
        return number + 1, jax.lax.cond(number < needed, measure, skip, *columns)

    _, parts = jax.lax.scan(run_chunk, 0, (_cut(hidden, chunk), _cut(targets, chunk)))
    rows, places = targets.shape

    def join(x):
        x = sharding.reshape(jnp.moveaxis(x, 0, 1), (rows, places), "batch", None)
        return sharding.constrain(x, None, None)

    return tuple(map(join, parts))


# ---- batches ----


def count_read(fitted: Fitted) -> int:
    """How many ids the model reads of a request."""
    return len(fitted.ids) - 1


def choose_rows(requests: int, length: int, multiple: int) -> int:
    """Rows of a bucket's batches: TOKENS for each of `multiple` parts, or fewer for few requests.

    They are a multiple of `multiple`.
    """
    most = bucket(max(1, TOKENS // length + 1)) // 2 or 1
    return multiple * min(max(1, most), bucket(-(-requests // multiple)))


def choose_chunk(rows: int, length: int, vocab: int) -> int:
    """Places of a row whose logits are made at once, a power of two."""
    fitting = max(1, LOGITS // (rows * vocab))
    return min(bucket(fitting + 1) // 2, CHUNK, bucket(length))


def make_batches(fitted: Sequence[Fitted], model: config.Model, multiple: int) -> Iterator[Batch]:
    """Batches by bucket, the longest first. Within a bucket long continuations stand together.

    The order does not depend on the process. All batches of a bucket have one shape, so that it
    compiles once.
    """
    by_length: dict[int, list[int]] = {}
    for number, request in enumerate(fitted):
        length = min(bucket(count_read(request), SMALLEST_BUCKET), model.max_seq)
        by_length.setdefault(length, []).append(number)

    for length in sorted(by_length, reverse=True):
        numbers = sorted(by_length[length], key=lambda number: -fitted[number].count)
        rows = choose_rows(len(numbers), length, multiple)
        chunk = choose_chunk(rows // multiple, length, model.vocab)
        for start in range(0, len(numbers), rows):
            yield _make_batch(fitted, numbers[start : start + rows], rows, length, chunk)


def _make_batch(fitted, numbers: list[int], rows: int, length: int, chunk: int) -> Batch:
    """Pads the requests `numbers` to `rows` of `length`. Empty rows read one token."""
    places = -(-length // chunk) * chunk
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    targets = np.zeros((rows, places), np.int32)
    for row, number in enumerate(numbers):
        request = fitted[number]
        size = count_read(request)
        tokens[row, :size] = request.ids[:-1]
        lengths[row] = size
        targets[row, : request.count] = request.ids[: -request.count - 1 : -1]

    longest = max(fitted[number].count for number in numbers)
    return Batch(numbers, tokens, lengths, targets, -(-longest // chunk), chunk)


# ---- what is asked ----


def _count_multiple(compute: config.Compute) -> int:
    """The number that must divide the rows of a batch on the current mesh."""
    parts = sharding.count_parts("batch")
    if sharding.axis_size("pipeline") == 1:
        return parts
    return parts * (compute.pipeline_microbatches or 1)


def carry_on() -> None:
    """What happens between batches where nobody watches."""


def score_requests(
    model: config.Model,
    compute: config.Compute,
    params,
    requests: Sequence[Request],
    report: Callable[[str], None],
    tick: Callable[[], None] = carry_on,
) -> list[Score]:
    """Scores the continuation of each request, in the order of the requests.

    `model` must be resolved. Its experts take all of their tokens. `params` may live on the
    current mesh, whatever its shape; all processes of a job must call this together. `report` gets
    one line if contexts were cut, because the model reads at most its context. `tick` is called
    before each batch, and may raise to end the work.

    Raises UsageError if a request cannot be scored, see `fit_request`.
    """
    model, compute, params = make_ready(model, compute, params, report)
    fitted = [
        fit_request(f"request {number}", request, model.max_seq, model.vocab)
        for number, request in enumerate(requests, 1)
    ]
    cut = sum(request.cut > 0 for request in fitted)
    if cut:
        report(
            f"{cut} of {len(fitted)} requests do not fit the context of {model.max_seq} tokens; "
            "the first tokens of their contexts were left out"
        )

    scores: dict[int, Score] = {}
    waiting = None
    for batch in make_batches(fitted, model, _count_multiple(compute)):
        tick()
        result = _run(params, batch, model, compute)
        # This batch is under way before the host waits for the one before it.
        if waiting:
            scores |= _collect(fitted, *waiting)
        waiting = batch, result
    if waiting:
        scores |= _collect(fitted, *waiting)
    return [scores[number] for number in range(len(fitted))]


def _run(params, batch: Batch, model: config.Model, compute: config.Compute):
    return _score(
        params,
        batch.tokens,
        batch.lengths,
        batch.targets,
        np.int32(batch.needed),
        model=model,
        compute=with_kernel(model, compute, batch.tokens.shape[1]),
        chunk=batch.chunk,
    )


def _collect(fitted, batch: Batch, result) -> dict[int, Score]:
    """Fetches the results of a batch -> {number of the request: its score}."""
    logprobs, greedy = jax.device_get(result)
    scores = {}
    for row, number in enumerate(batch.numbers):
        count = fitted[number].count
        own = logprobs[row, :count][::-1].copy()
        total = float(own.sum(dtype=np.float64))
        scores[number] = Score(total, own, bool(greedy[row, :count].all()), fitted[number].cut)
    return scores


@partial(jax.jit, static_argnames=("model", "compute"))
@sharding.using_rules(sharding.WHOLE_ROWS)
def _logits(params, tokens, lengths, *, model: config.Model, compute: config.Compute):
    """The logits of one row [T, V], on every device."""
    tokens = sharding.constrain(tokens, "batch", None)
    lengths = sharding.constrain(lengths, "batch")
    network = Transformer(model, compute)
    hidden = _read(params, tokens, lengths, network)
    logits: Any = network.apply({"params": params}, hidden, method="unembed")
    return sharding.constrain(logits, None, None, None)[0]


def compute_logits(
    model: config.Model, compute: config.Compute, params, ids: np.ndarray, report
) -> np.ndarray:
    """The logits after each of `ids` [T], float32 [T, V]. V counts the rows of the embedding.

    Arguments are those of `score_requests`. Raises UsageError if the ids do not fit the context, or
    if one is no row of the embedding.
    """
    model, compute, params = make_ready(model, compute, params, report)
    if not 0 < len(ids) <= model.max_seq:
        raise UsageError(
            f"the text has {len(ids)} tokens and the model's context holds 1 to {model.max_seq}"
        )
    check_ids("the text", ids, model.vocab)

    length = min(bucket(len(ids), SMALLEST_BUCKET), model.max_seq)
    rows = _count_multiple(compute)
    tokens = np.zeros((rows, length), np.int32)
    tokens[0, : len(ids)] = ids
    lengths = np.ones(rows, np.int32)
    lengths[0] = len(ids)

    static = {"model": model, "compute": with_kernel(model, compute, length)}
    return np.asarray(_logits(params, tokens, lengths, **static))[: len(ids)]
