"""How likely a model holds given continuations.

Requests become rows (score_rows.py), and rows become batches by length (score_batches.py). Each
length is one program. The head and its logits are run at the scored places alone, some of them at a
time, as far as the batch needs. The device sends two numbers for each token and never the logits.

A text that many requests begin with is read once into a KV cache (prefixes.py). One such text has
its keys and values on a device at a time, and all rows of a batch are behind the same one.

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
from gpt_jax.infer.prefixes import make_groups
from gpt_jax.infer.prompts import SMALLEST_BUCKET, bucket
from gpt_jax.infer.ready import make_ready, with_kernel
from gpt_jax.infer.requests import Fitted, Request, check_ids, fit_request
from gpt_jax.infer.score_batches import Batch, make_batches
from gpt_jax.infer.score_rows import CONTEXT, padded
from gpt_jax.model import Transformer, make_cache


class Score(NamedTuple):
    """What a model says of one continuation.

    `total` is the sum of `logprobs` in float64, in nats. `is_greedy` tells whether each token is
    the most likely one. `cut` counts the ids of the context that did not fit.
    """

    total: float
    logprobs: np.ndarray  # float32 [tokens of the continuation]
    is_greedy: bool
    cut: int


class Text(NamedTuple):
    """A text that rows are behind: its KV cache and its tokens, for each part of the mesh."""

    cache: dict
    lengths: jax.Array  # int32 [parts]


# ---- the programs ----


def _read(params, columns, network: Transformer, text: Text | None = None) -> jax.Array:
    """The last hidden states [B, T, D] of right-padded rows, which may be behind a text."""
    batch = {name: sharding.constrain(x, "batch", None) for name, x in columns.items()}
    if text is not None:
        hidden: Any = network.apply({"params": params}, batch, *text, method="continue_text")
        return hidden
    features: Any = network.apply({"params": params}, batch, method="features")
    return features[0]


@partial(jax.jit, static_argnames=("model", "compute", "slots"))
@sharding.using_rules(sharding.WHOLE_ROWS)
def _read_text(
    params, tokens, lengths, *, model: config.Model, compute: config.Compute, slots: int
) -> Text:
    """Reads a text into a cache of `slots` tokens. Each part of the mesh has a row of `tokens`."""
    tokens = sharding.constrain(tokens, "batch", None)
    lengths = sharding.constrain(lengths, "batch")
    is_real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    batch = {"tokens": tokens, "segment": is_real.astype(jnp.int32)}

    cache = make_cache(model, compute, tokens.shape[0], slots)
    run: Any = Transformer(model, compute).apply
    _, cache = run({"params": params}, batch, cache, lengths, method="step")
    return Text(cache, lengths)


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
    text: Text | None = None,
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
    hidden = _pick_places(_read(params, columns, network, text), places)
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
    for batch, text in _read_texts(fitted, params, model, compute):
        tick()
        result = _run(params, batch, model, compute, text)
        # This batch is under way before the host waits for the one before it.
        if waiting:
            scores |= _collect(fitted, *waiting)
        waiting = batch, result
    if waiting:
        scores |= _collect(fitted, *waiting)
    return [scores[number] for number in range(len(fitted))]


def _read_texts(
    fitted: Sequence[Fitted], params, model: config.Model, compute: config.Compute
) -> Iterator[tuple[Batch, Text | None]]:
    """Batches with the text that each is behind. A text is read before its first batch.

    All caches have as many slots as the longest text needs, so that they are no more programs. A
    pipeline has no cache, and reads whole rows.
    """
    multiple = _count_multiple(compute)
    has_prefixes = sharding.axis_size("pipeline") == 1
    groups = make_groups(fitted, model, multiple, has_prefixes)
    slots = padded(max((len(group.prefix) for group in groups), default=0), model.max_seq)

    text = None
    last = np.zeros(0, np.int32)
    for batch in make_batches(groups, model, multiple):
        if batch.prefix is not last and len(batch.prefix):
            last = batch.prefix
            length = padded(len(last), model.max_seq)
            tokens = np.zeros((multiple, length), np.int32)
            tokens[:, : len(last)] = last
            lengths = np.full(multiple, len(last), np.int32)
            kernel = with_kernel(model, compute, length)
            text = _read_text(params, tokens, lengths, model=model, compute=kernel, slots=slots)
        yield batch, text


def _run(
    params, batch: Batch, model: config.Model, compute: config.Compute, text: Text | None = None
):
    length = batch.columns["tokens"].shape[1]
    return _score(
        params,
        batch.columns,
        batch.places,
        batch.targets,
        np.int32(batch.needed),
        text,
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
