"""Layers in stages over the mesh axis pipeline: a circular schedule (called by transformer).

Every stage holds its layers and works on a microbatch of its own at each tick; then all streams
move on by one stage. A microbatch goes round `rounds` times, so that the stages are idle for
(stages - 1) / (rounds * microbatches) of the time (Narayanan et al. 2021, arXiv:2104.04473; as one
vectorised program: Xu et al. 2021, arXiv:2105.04663). The backward pass is the transpose of the
forward one.

Shapes: S stages, R rounds, M microbatches, B batch, T sequence; a stage has k = layers / (R * S)
layers a round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding


def run(layer: Callable, stacked, stream, columns, rounds: int, microbatches: int, unroll: int):
    """`stream` after all layers. `layer(stream, weights, columns) -> stream`: one layer; `stacked`:
    the weights of all, [layers, …]; `stream` and `columns` (what goes with it unchanged): trees of
    [B, …]; `unroll`: layers of a stage in one turn of its loop.

    The rows of a microbatch are M apart, so that each device splits its own. M is at least S,
    divides B, and R * S divides the layers (config.check)."""
    stages = sharding.axis_size("pipeline")
    count = microbatches or stages
    weights = jax.tree.map(partial(_to_stages, stages=stages, rounds=rounds), stacked)
    with sharding.using_rules(sharding.STAGE):
        held = jax.tree.map(partial(_split, stages=stages, count=count), (stream, columns))
        moving = jax.tree.map(lambda x: x[:, 0], held)
        first = sharding.constrain(jnp.arange(stages) == 0, "stages")

        def pick(a, b):
            return jax.tree.map(
                lambda a, b: jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b), a, b
            )

        def stage(weights, stream, columns):
            return jax.lax.scan(
                lambda x, w: (layer(x, w, columns), None), stream, weights, unroll=unroll
            )[0]

        def tick(carry, time):
            held, moving = carry
            waiting = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, time % count, 1, keepdims=False), held
            )
            stream, columns = pick(waiting, moving)
            round_of = jnp.clip((time - jnp.arange(stages)) // count, 0, rounds - 1)
            stream = jax.vmap(stage)(_round(weights, round_of, rounds), stream, columns)
            moving = jax.tree.map(_next_stage, (stream, columns))
            done = time - (
                stages - 1
            )  # what has come round to the first stage, once it is a microbatch

            def keep(old, new):
                return jnp.where(
                    done >= 0, jax.lax.dynamic_update_index_in_dim(old, new, done % count, 1), old
                )

            return (jax.tree.map(keep, held, moving), moving), None

        (held, _), _ = jax.lax.scan(tick, (held, moving), jnp.arange(rounds * count + stages - 1))
        out = jax.tree.map(
            lambda x: jnp.where(first.reshape(-1, *(1,) * (x.ndim - 1)), x, 0).sum(0), held[0]
        )
    return jax.tree.map(_join, out)


def _to_stages(x, stages: int, rounds: int):
    """[layers, …] -> [S, R, k, …]: layer (r * S + s) * k + j is the j-th of stage s in round r."""
    rest = jax.typeof(x).sharding.spec[1:]
    shape = (rounds, stages, x.shape[0] // (rounds * stages), *x.shape[1:])
    return jnp.moveaxis(
        jax.lax.reshape(x, shape, out_sharding=P(None, "pipeline", None, *rest)), 1, 0
    )


def _round(weights, index, rounds: int):
    """Each stage's weights [S, k, …] of its round `index` [S]."""
    if rounds == 1:
        return jax.tree.map(lambda w: w[:, 0], weights)

    def pick(w):
        spec = jax.typeof(w).sharding.spec
        take = jax.shard_map(
            lambda w, i: jax.lax.dynamic_index_in_dim(w, i[0], 1, keepdims=False),
            check_vma=False,
            in_specs=(spec, P("pipeline")),
            out_specs=P(spec[0], *spec[2:]),
        )
        return take(w, sharding.constrain(index, "stages"))

    return jax.tree.map(pick, weights)


def _rest(x, lead: int) -> tuple[Any, ...]:
    """The mesh axes of dims after the first `lead`, as they are."""
    return tuple(jax.typeof(x).sharding.spec[lead:])


def _split(x, stages: int, count: int):
    """[B, …] -> the same for every stage, [S, M, B / M, …]."""
    rest, rows = _rest(x, 1), sharding.used_spec("batch")[0]
    x = jax.reshard(x, P(rows, *rest))
    x = jax.lax.reshape(
        x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=P(rows, None, *rest)
    )
    x = jnp.swapaxes(x, 0, 1)
    return jax.reshard(
        jnp.broadcast_to(x[None], (stages, *x.shape)), P("pipeline", None, rows, *rest)
    )


def _join(x):
    """[M, B / M, …] -> [B, …], over all batch axes again."""
    rest, rows = _rest(x, 2), jax.typeof(x).sharding.spec[1]
    x = jnp.swapaxes(x, 0, 1)
    x = jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=P(rows, *rest))
    return jax.reshard(x, P(sharding.used_spec("batch")[0], *rest))


def _next_stage(x):
    """[S, …] moved on by one stage, the last one's to the first."""
    spec, stages = jax.typeof(x).sharding.spec, x.shape[0]
    ring = [(i, (i + 1) % stages) for i in range(stages)]
    return jax.shard_map(
        lambda x: jax.lax.ppermute(x, "pipeline", ring),
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )(x)
