"""How likely a model holds given continuations.

Requests become rows (score_rows.py), and rows are sorted by length into buckets. These are the
powers of two from 16 up to the context. A bucket is one program. The head and its logits are run at
the scored places alone, some of them at a time, as far as the batch needs. The device sends two
numbers for each token and never the logits.

Shapes: B rows, T tokens that are read, D embed, V rows of the embedding, S places that are scored,
C places of a chunk.
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
from gpt_jax.infer.score_rows import CONTEXT, Row, make_rows, padded
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
    """Rows of one program, padded to it.

    `columns` are what the model reads, each [B, T]. `places` [B, S] tells after which token of its
    row each target [B, S] comes.
    """

    rows: list[Row]
    columns: dict[str, np.ndarray]  # int32, and bool
    places: np.ndarray  # int32
    targets: np.ndarray  # int32
    needed: int  # chunks
    chunk: int


# ---- the program ----


def _read(params, columns, network: Transformer) -> jax.Array:
    """The last hidden states [B, T, D] of right-padded rows."""
    batch = {name: sharding.constrain(x, "batch", None) for name, x in columns.items()}
    hidden: Any = network.apply({"params": params}, batch, method="features")
    return hidden[0]


def _pick_places(hidden, places) -> jax.Array:
    """The hidden states [B, S, D] at places [B, S] of each row."""

    def pick(hidden, places):
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    axes = ("batch", None, None)
    return sharding.run_local(pick, (axes, ("batch", None)), axes)(hidden, places)


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
    columns,
    places,
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
    places = sharding.constrain(places, "batch", None)
    targets = sharding.constrain(targets, "batch", None)
    network = Transformer(model, compute)
    hidden = _pick_places(_read(params, columns, network), places)
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

    def join(x):
        x = sharding.reshape(jnp.moveaxis(x, 0, 1), targets.shape, "batch", None)
        return sharding.constrain(x, None, None)

    return tuple(map(join, parts))


# ---- batches ----


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
    """Batches by bucket, the longest first. Within a bucket rows of many targets stand together.

    The order does not depend on the process. All batches of a bucket have one shape, so that it
    compiles once.
    """
    rows = make_rows(fitted, model)
    has_branches = len(rows) < len(fitted)

    by_length: dict[int, list[Row]] = {}
    for row in rows:
        length = padded(max(len(row.tokens), len(row.targets)), model.max_seq)
        by_length.setdefault(length, []).append(row)

    for length in sorted(by_length, reverse=True):
        waiting = sorted(by_length[length], key=lambda row: -len(row.targets))
        count = choose_rows(len(waiting), length, multiple)
        chunk = choose_chunk(count // multiple, length, model.vocab)
        for start in range(0, len(waiting), count):
            part = waiting[start : start + count]
            yield _make_batch(part, (count, length), chunk, has_branches)


def _make_batch(rows: list[Row], shape: tuple[int, int], chunk: int, has_branches: bool) -> Batch:
    """Pads rows to `shape` [B, T]. Empty rows read one token."""
    names = ("tokens", "segment", "position") if has_branches else ("tokens", "segment")
    columns = {name: np.zeros(shape, np.int32) for name in names}
    columns["segment"][:, 0] = CONTEXT
    room = shape[0], -(-shape[1] // chunk) * chunk
    places = np.zeros(room, np.int32)
    targets = np.zeros(room, np.int32)

    for number, row in enumerate(rows):
        for name in names:
            columns[name][number, : len(row.tokens)] = getattr(row, name)
        places[number, : len(row.places)] = row.places
        targets[number, : len(row.targets)] = row.targets

    if has_branches:
        columns["common"] = columns["segment"] == CONTEXT
    else:
        columns["segment"] = np.minimum(columns["segment"], CONTEXT)
    needed = -(-max(len(row.targets) for row in rows) // chunk)
    return Batch(rows, columns, places, targets, needed, chunk)


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
    length = batch.columns["tokens"].shape[1]
    return _score(
        params,
        batch.columns,
        batch.places,
        batch.targets,
        np.int32(batch.needed),
        model=model,
        compute=with_kernel(model, compute, length, "common" in batch.columns),
        chunk=batch.chunk,
    )


def _collect(fitted, batch: Batch, result) -> dict[int, Score]:
    """Fetches the results of a batch -> {number of the request: its score}."""
    logprobs, greedy = jax.device_get(result)
    scores = {}
    for place, row in enumerate(batch.rows):
        start = 0
        for number in row.numbers:
            own = slice(start, start + fitted[number].count)
            found = logprobs[place, own].copy()
            total = float(found.sum(dtype=np.float64))
            is_greedy = bool(greedy[place, own].all())
            scores[number] = Score(total, found, is_greedy, fitted[number].cut)
            start = own.stop
    return scores


@partial(jax.jit, static_argnames=("model", "compute"))
@sharding.using_rules(sharding.WHOLE_ROWS)
def _logits(params, columns, *, model: config.Model, compute: config.Compute):
    """The logits of the first row [T, V], on every device."""
    network = Transformer(model, compute)
    hidden = _read(params, columns, network)
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
    segment = np.zeros((rows, length), np.int32)
    segment[:, 0] = CONTEXT
    segment[0, : len(ids)] = CONTEXT
    columns = {"tokens": tokens, "segment": segment}

    static = {"model": model, "compute": with_kernel(model, compute, length)}
    return np.asarray(_logits(params, columns, **static))[: len(ids)]
