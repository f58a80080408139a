"""Objectives, which turn logits and a batch into sums that can be merged.

Shapes: B batch, T sequence, D embed, V vocab. A Sums is `{name: (sum, weight)}`. It is divided
once, by the code that prints it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config, sharding


class Network(NamedTuple):
    """The model as pure functions.

    `features(params, batch, key or None) -> ([B, T, D], report)`, where a key turns dropout on.
    `head(params, dtype) -> [D, V]`. `logits(head, hidden) -> [B, T, V]` in float32.

    `describe(path)` tells the role of the parameter at a path, and whether it is stacked over
    layers (`optim.groups.Traits`).

    The report has the measurements of the layers, rows first. Its `objective` [B] is added to the
    objective. Its `tokens` [B] are the weight of its other entries.
    """

    features: Callable
    head: Callable
    logits: Callable
    describe: Callable


def next_token(logits: jax.Array, batch: dict, train: config.Train) -> dict:
    """Cross-entropy of `targets` under logits [B, T, V] where `weight` is not 0.

    The Sums are objective, loss, accuracy and bits_per_byte. The objective is minimised and has
    label smoothing and z-loss. The loss is in plain nats a token. The weight of bits_per_byte is
    the UTF-8 bytes that the targets stand for.
    """
    targets = batch["targets"][..., None]
    weight = batch["weight"]

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
        "bits_per_byte": (summed(loss) / math.log(2), summed(batch["bytes"].astype(jnp.float32))),
    }


OBJECTIVES = {"next_token": next_token}


def batch_sums(network: Network, params, batch: dict, key, train: config.Train) -> dict:
    """Sums of the configured objective over a batch of columns [B, T].

    With `loss_chunk` only that many tokens of each row have logits at a time. The backward pass
    then computes them again.
    """
    hidden, report = network.features(params, batch, key)
    sums = _head_sums(network, params, hidden, batch, train)
    if report:
        total, weight = sums["objective"]
        sums["objective"] = (total + report["objective"].sum(), weight)
        tokens = report["tokens"].sum()
        sums |= {
            name: (value.sum(0), tokens)
            for name, value in report.items()
            if name not in ("objective", "tokens")
        }
    return sums


def _head_sums(network: Network, params, hidden, batch: dict, train: config.Train) -> dict:
    objective = OBJECTIVES[train.objective]
    if not train.loss_chunk or train.loss_chunk >= hidden.shape[1]:
        return objective(network.logits(network.head(params, hidden.dtype), hidden), batch, train)

    def chunks(x):
        # The tokens of a chunk are not neighbours, so that each device splits its own tokens.
        # Sums do not depend on that.
        shape = (x.shape[0], train.loss_chunk, x.shape[1] // train.loss_chunk, *x.shape[2:])
        x = sharding.reshape(x, shape, "batch", "seq", None, *[None] * (x.ndim - 2))
        return jnp.moveaxis(x, 2, 0)

    @jax.checkpoint
    def chunk_sums(head, hidden, columns):
        return objective(network.logits(head.astype(hidden.dtype), hidden), columns, train)

    # The head is gathered once and not for each chunk. It is float32, so that the gradients of
    # the chunks are summed in float32.
    head = network.head(params, hidden.dtype).astype(jnp.float32)
    columns = {name: chunks(batch[name]) for name in ("targets", "weight", "bytes")}

    def add_chunk(_, chunk):
        return None, chunk_sums(head, *chunk)

    _, parts = jax.lax.scan(add_chunk, None, (chunks(hidden), columns))
    return jax.tree.map(lambda x: x.sum(0), parts)
