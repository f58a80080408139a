"""Objectives, which turn a network, its parameters and a batch into sums that can be merged.

An objective is a pure function `(network, params, frozen, batch, key, train) -> Sums`:

- `params` are learned, and gradients are taken of them alone;
- `frozen` is a tree of parameters that is never in the state, such as a teacher; {} without any;
- `key` turns dropout on, and is None in evaluation.

A Sums is `{name: (sum, weight)}`. Its `objective` is minimised. It is divided once, by the code
that prints it.

Shapes: B batch, T sequence, D embed, V vocab.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding
from gpt_jax.train.chunks import add_chunks


def take_params(params, frozen):
    """The parameters of a network whose learned ones are all it has."""
    return params


class Network(NamedTuple):
    """The model as pure functions.

    `features(params, batch, key or None) -> ([B, T, D], report)`, where a key turns dropout on.
    `head(params, dtype) -> [D, V]`. `logits(head, hidden) -> [B, T, V]` in float32.

    `describe(path)` tells the role of the parameter at a path, and whether it is stacked over
    layers (`optim.groups.Traits`).

    `assemble(learned, frozen)` makes the `params` of the other functions, of what is learned and of
    what is not. An objective gets its result.

    The report has the measurements of the layers, rows first. Its `objective` [B] is added to the
    objective. Its `tokens` [B] are the weight of its other entries.
    """

    features: Callable
    head: Callable
    logits: Callable
    describe: Callable
    assemble: Callable = take_params


class Readout(NamedTuple):
    """Hidden states [B, T, D] of a network, before its head has made logits of them."""

    network: Network
    params: Any
    hidden: jax.Array


# ---- parts that objectives share -----------------------------------------------------------------


def sum_cross_entropy(logits: jax.Array, columns: dict, train: config.Train) -> dict:
    """Sums of the cross-entropy of `targets` under logits [B, T, V] where `weight` is not 0.

    The Sums are objective, loss, accuracy and bits_per_byte. The objective is minimised and has
    label smoothing and z-loss. The loss is in plain nats a token. The weight of bits_per_byte is
    the UTF-8 bytes that the targets stand for.
    """
    targets = columns["targets"][..., None]
    weight = columns["weight"]

    # A comparison with an iota picks the target's logit, because a gather cannot read logits that
    # are sharded over the vocabulary.
    vocab = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    vocab = sharding.constrain(vocab, None, None, "vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.where(vocab == targets, logits, 0.0).sum(-1)
    loss = log_z - at_target

    best = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    first_best = jnp.where(logits == best, vocab, logits.shape[-1]).min(-1)

    objective = loss
    if train.label_smoothing:
        objective = (1 - train.label_smoothing) * loss + train.label_smoothing * (
            log_z - logits.mean(-1)
        )
    if train.z_loss:  # Chowdhery et al. 2022: keeps the normaliser near 1
        objective = objective + train.z_loss * jnp.square(log_z)

    total = weight.sum()

    def summed(values):
        return (values * weight).sum()

    return {
        "objective": (summed(objective), total),
        "loss": (summed(loss), total),
        "accuracy": (summed((first_best == targets[..., 0]).astype(jnp.float32)), total),
        "bits_per_byte": (summed(loss) / math.log(2), summed(columns["bytes"].astype(jnp.float32))),
    }


def sum_logits(
    token_sums: Callable, columns: dict, chunk: int, *readouts: Readout, learned: str = "objective"
) -> dict:
    """Sums of `token_sums(*logits, columns)`, with logits [B, T, V] of each readout in turn.

    With `chunk` only that many tokens of each row have logits at a time, and `token_sums` sees the
    same tokens of each column [B, T]. Then the sum `learned` alone has a gradient, and that is made
    in the forward pass, see `chunks.add_chunks`.
    """
    networks = [readout.network for readout in readouts]
    heads = [network.head(params, hidden.dtype) for network, params, hidden in readouts]
    hiddens = [readout.hidden for readout in readouts]

    def sum_chunk(heads, hiddens, columns):
        triples = zip(networks, heads, hiddens, strict=True)
        logits = (network.logits(head, hidden) for network, head, hidden in triples)
        return token_sums(*logits, columns)

    length = columns["weight"].shape[1]
    if not chunk or chunk >= length:
        return sum_chunk(heads, hiddens, columns)

    def cut(x):
        # The tokens of a chunk are not neighbours, so that each device splits its own tokens.
        # Sums do not depend on that.
        shape = (x.shape[0], chunk, x.shape[1] // chunk, *x.shape[2:])
        x = sharding.reshape(x, shape, "batch", "seq", None, *[None] * (x.ndim - 2))
        return jnp.moveaxis(x, 2, 0)

    heads = [sharding.sum_gradient_once(head) for head in heads]
    hiddens, columns = jax.tree.map(cut, (hiddens, columns))
    return add_chunks(sum_chunk, learned, heads, hiddens, columns)


def add_report(sums: dict, report: dict) -> dict:
    """`sums` with what the layers report, see `Network.features`."""
    if not report:
        return sums
    total, weight = sums["objective"]
    objective = total + report["objective"].sum(), weight
    tokens = report["tokens"].sum()
    measured = {
        name: (value.sum(0), tokens)
        for name, value in report.items()
        if name not in ("objective", "tokens")
    }
    return sums | {"objective": objective} | measured


# ---- objectives ----------------------------------------------------------------------------------


def next_token(network: Network, params, frozen, batch: dict, key, train: config.Train) -> dict:
    """Cross-entropy of the next token, see `sum_cross_entropy`. Nothing is frozen."""
    hidden, report = network.features(params, batch, key)
    columns = {name: batch[name] for name in ("targets", "weight", "bytes")}
    token_sums = partial(sum_cross_entropy, train=train)
    sums = sum_logits(token_sums, columns, train.loss_chunk, Readout(network, params, hidden))
    return add_report(sums, report)


OBJECTIVES = {"next_token": next_token}
