"""Layers in stages over the mesh axis pipeline, in a circular schedule.

Every stage has its layers, and works on a microbatch of its own at each tick. Then all streams move
on by one stage. A microbatch goes round `rounds` times. The stages are therefore idle for
(stages - 1) / (rounds * microbatches) of the time (Narayanan et al. 2021, arXiv:2104.04473). The
schedule is one vectorised program (Xu et al. 2021, arXiv:2105.04663), and the backward pass is its
transpose.

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
    """Sends `stream` through all layers.

    `layer(stream, weights, columns) -> stream` is one layer, and `stacked` are the weights of all,
    [layers, …]. `stream` and `columns` are trees of [B, …]. The columns accompany the stream and
    do not change. A stage's loop runs `unroll` layers in one turn.

    The rows of a microbatch are M apart, so that each device splits its own. M must be at least S
    and divide B, and R * S must divide the layers. The config is checked for this.
    """
    stages = sharding.axis_size("pipeline")
    count = microbatches or stages
    weights = jax.tree.map(partial(_to_stages, stages=stages, rounds=rounds), stacked)

    def run_stage(weights, stream, columns):
        def run_layer(stream, weights):
            return layer(stream, weights, columns), None

        return jax.lax.scan(run_layer, stream, weights, unroll=unroll)[0]

    with sharding.using_rules(sharding.STAGE):
        waiting = jax.tree.map(partial(_split, stages=stages, count=count), (stream, columns))
        moving = jax.tree.map(lambda x: x[:, 0], waiting)
        is_first = sharding.constrain(jnp.arange(stages) == 0, "stages")

        def tick(carry, time):
            waiting, moving = carry

            # The first stage takes the next microbatch that waits.
            fresh = jax.tree.map(partial(_take_microbatch, number=time % count), waiting)
            stream, columns = _select_at_first(is_first, fresh, moving)

            stage_rounds = jnp.clip((time - jnp.arange(stages)) // count, 0, rounds - 1)
            own_weights = _take_round(weights, stage_rounds, rounds)
            stream = jax.vmap(run_stage)(own_weights, stream, columns)
            moving = jax.tree.map(_next_stage, (stream, columns))

            # From now on, what comes round to the first stage is a microbatch.
            arrived = time - (stages - 1)
            put = partial(_put_microbatch, number=arrived, count=count)
            return (jax.tree.map(put, waiting, moving), moving), None

        ticks = jnp.arange(rounds * count + stages - 1)
        (waiting, _), _ = jax.lax.scan(tick, (waiting, moving), ticks)

        def take_first(x):
            return jnp.where(_match_dims(is_first, x), x, 0).sum(0)

        out = jax.tree.map(take_first, waiting[0])
    return jax.tree.map(_join, out)


def _match_dims(is_first, x):
    """Reshapes is_first [S] so that it masks x [S, …]."""
    return is_first.reshape(-1, *[1] * (x.ndim - 1))


def _select_at_first(is_first, fresh, moving):
    """Takes `fresh` on the first stage and `moving` on all others."""

    def select(x, y):
        return jnp.where(_match_dims(is_first, x), x, y)

    return jax.tree.map(select, fresh, moving)


def _take_microbatch(x, number):
    """[S, M, …] -> [S, …]: the microbatch of this number."""
    return jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False)


def _put_microbatch(old, new, number, count: int):
    """Puts new [S, …] into old [S, M, …] as microbatch `number` % `count`.

    A negative number changes nothing.
    """
    changed = jax.lax.dynamic_update_index_in_dim(old, new, number % count, 1)
    return jnp.where(number >= 0, changed, old)


def _to_stages(x, stages: int, rounds: int):
    """[layers, …] -> [S, R, k, …]: layer (r * S + s) * k + j is the j-th of stage s in round r."""
    rest = jax.typeof(x).sharding.spec[1:]
    shape = (rounds, stages, x.shape[0] // (rounds * stages), *x.shape[1:])
    by_round = jax.lax.reshape(x, shape, out_sharding=P(None, "pipeline", None, *rest))
    return jnp.moveaxis(by_round, 1, 0)


def _take_round(weights, stage_rounds, rounds: int):
    """Takes each stage's weights [S, k, …] of its round, which `stage_rounds` [S] tells."""
    if rounds == 1:
        return jax.tree.map(lambda w: w[:, 0], weights)

    def take_own(w, own_round):
        return jax.lax.dynamic_index_in_dim(w, own_round[0], 1, keepdims=False)

    def take(w):
        spec = jax.typeof(w).sharding.spec
        mapped = jax.shard_map(
            take_own,
            check_vma=False,
            in_specs=(spec, P("pipeline")),
            out_specs=P(spec[0], *spec[2:]),
        )
        return mapped(w, sharding.constrain(stage_rounds, "stages"))

    return jax.tree.map(take, weights)


def _rest(x, lead: int) -> tuple[Any, ...]:
    """Returns the mesh axes of the dims after the first `lead`."""
    return tuple(jax.typeof(x).sharding.spec[lead:])


def _split(x, stages: int, count: int):
    """[B, …] -> [S, M, B / M, …]: microbatches, the same for every stage."""
    rest = _rest(x, 1)
    rows = sharding.used_spec("batch")[0]
    x = jax.reshard(x, P(rows, *rest))
    shape = (x.shape[0] // count, count, *x.shape[1:])
    x = jax.lax.reshape(x, shape, out_sharding=P(rows, None, *rest))
    x = jnp.swapaxes(x, 0, 1)
    x = jnp.broadcast_to(x[None], (stages, *x.shape))
    return jax.reshard(x, P("pipeline", None, rows, *rest))


def _join(x):
    """[M, B / M, …] -> [B, …], over all batch axes again."""
    rest = _rest(x, 2)
    rows = jax.typeof(x).sharding.spec[1]
    x = jnp.swapaxes(x, 0, 1)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    x = jax.lax.reshape(x, shape, out_sharding=P(rows, *rest))
    return jax.reshard(x, P(sharding.used_spec("batch")[0], *rest))


def _next_stage(x):
    """Moves [S, …] on by one stage, and the last one's part to the first."""
    spec = jax.typeof(x).sharding.spec
    stages = x.shape[0]
    ring = [(i, (i + 1) % stages) for i in range(stages)]

    def move(x):
        return jax.lax.ppermute(x, "pipeline", ring)

    return jax.shard_map(move, in_specs=spec, out_specs=spec, check_vma=False)(x)
