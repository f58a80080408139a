"""What is scored: pairs of ids, made of texts and cut to the context.

The rules are those of lm-evaluation-harness, so that scores can be compared with those of others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.errors import UsageError

Ids = Sequence[int] | np.ndarray  # [tokens]


class Request(NamedTuple):
    """The ids of a continuation, and those before it. Only the continuation is scored."""

    context: Ids
    continuation: Ids


class Fitted(NamedTuple):
    """A request in the context of a model.

    The last `count` of `ids` are scored, and all but the last are read. `cut` ids were left out
    on the left.
    """

    ids: np.ndarray  # int32
    count: int
    cut: int


def start_token(tokenizer: Tokenizer) -> int:
    """The id that stands before a text without a context.

    It is the tokenizer's `begin`, or else end of text, as in training.

    Raises UsageError if the tokenizer has none.
    """
    if tokenizer.begin is not None:
        return tokenizer.begin
    if tokenizer.eot is None:
        raise UsageError(
            f"an empty context: the {tokenizer.name} tokenizer has no end-of-text token to start "
            "from; give a context of at least one character"
        )
    return tokenizer.eot


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Makes requests of texts (context, continuation).

    White space at the end of a context moves to its continuation, because a token of most
    vocabularies begins with its space. The context has its own ids. The continuation has those of
    the whole text after as many. The tokenizer's `begin`, if it has one, comes before the context.
    An empty context becomes the start token, unless the continuation begins with it.

    Raises UsageError as the tokenizer does, and for an empty context without a start token.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    heads = tokenizer.encode_batch(contexts)

    requests = []
    for whole, head in zip(wholes, heads, strict=True):
        if len(head):
            before = [] if tokenizer.begin is None else [tokenizer.begin]
            context = np.concatenate([before, head]).astype(np.int64)
            requests.append(Request(context, whole[len(head) :]))
            continue
        requests.append(start_request(tokenizer, whole))
    return requests


def start_request(tokenizer: Tokenizer, ids: Ids) -> Request:
    """Makes a request of ids without a context: the start token becomes it.

    Ids that begin with the start token are not given another one. Raises UsageError as
    `start_token` does.
    """
    start = start_token(tokenizer)
    whole = np.asarray(ids, np.int64)
    if not len(whole) or whole[0] != start:
        whole = np.concatenate([[start], whole])
    return Request(whole[:1], whole[1:])


def make_rolling_requests(ids: Ids, start: int, context: int) -> list[Request]:
    """Requests that together score each of `ids` once, with as much before it as fits.

    The first one reads `start` and then the text. A later one is filled up on the left with ids
    that were scored before.
    """
    requests = []
    done = 0
    while done < len(ids):
        end = min(done + context, len(ids))
        # A window reads `context` ids. The last id that it predicts is not read.
        before = max(0, end - 1 - context)
        seen = ids[before:done] if done else [start]
        requests.append(Request(seen, ids[done:end]))
        done = end
    return requests


def is_too_long(request: Request, context: int) -> bool:
    """Whether the continuation of a request does not fit the context of a model."""
    return len(request.continuation) > context


def fit_request(name: str, request: Request, context: int, vocab: int) -> Fitted:
    """Cuts a request on the left, so that the model reads at most `context` ids.

    Raises UsageError if a part of it is empty, if an id is no row of the embedding, or if the
    continuation alone does not fit. The error calls it `name`.
    """
    count = len(request.continuation)
    if not len(request.context) or not count:
        part = "continuation" if len(request.context) else "context"
        raise UsageError(f"{name}: its {part} has no tokens; give at least one")
    if is_too_long(request, context):
        raise UsageError(
            f"{name}: its continuation has {count} tokens and the model's context holds "
            f"{context}; shorten it"
        )

    ids = np.concatenate([np.asarray(part, np.int64) for part in request])
    check_ids(name, ids, vocab)
    kept = ids[-(context + 1) :].astype(np.int32)
    return Fitted(kept, count, len(ids) - len(kept))


def check_ids(what: str, ids: np.ndarray, vocab: int) -> None:
    """Raises UsageError for an id that is no row of the embedding. A lookup would clamp it."""
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if len(wrong):
        raise UsageError(f"{what}: has the id {wrong[0]}; expected 0 to {vocab - 1}")
