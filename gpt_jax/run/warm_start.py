"""The state of a new run that starts from the weights of another one.

The mesh, the batches, the schedule, the optimiser and the text may all be others. What decides the
meaning of the weights must be the same. Tables of the vocabulary and of learned positions may be
longer: their first rows are the checkpoint's, and the others are fresh.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax import config as configs, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model import abstract_params, describe_parameter, init_params
from gpt_jax.run.finite import find_nonfinite
from gpt_jax.run.parts import Parts
from gpt_jax.run.source import Source
from gpt_jax.train import TrainState, rewind

# Logical axes whose length may grow.
GROWING = ("vocab", "position")


class Weights(NamedTuple):
    """The weights that a run starts from, and the optimiser's moments if it takes them over."""

    params: Any
    opt: Any


def start_from(parts: Parts, source: Source, say) -> TrainState:
    """The first state of a run: the source's weights, in the layout of this run's mesh.

    Raises UsageError as `load_weights` does.
    """
    weights = load_weights(parts, source, say)
    state = parts.start(weights.params)
    return state if weights.opt is None else state._replace(opt=rewind(weights.opt))


def load_weights(parts: Parts, source: Source, say) -> Weights:
    """The source's weights, in the layout of this run's mesh.

    Raises UsageError if an array there has another shape and cannot grow into this run's, and for
    weights that are NaN or infinite.
    """
    init = parts.config.init
    item = "ema" if init.averaged else "params"
    wanted = parts.abstract.params if parts.base is None else parts.base
    saved = abstract_params(source.config.model)
    grown = find_grown(saved, wanted)

    def place(path, old, new):
        # A shorter table may not divide over the mesh, so it is whole on every device at first.
        layout = NamedSharding(parts.mesh, P()) if path in grown else new.sharding
        return jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=layout)

    abstract = map_by_path(place, saved, wanted)
    trees = {item: abstract}
    if grown and parts.base is not None:
        raise UsageError(
            f"config.lora.rank = {parts.config.lora.rank}: {', '.join(grown)} would grow, and "
            "the new rows could not be learned; use the tokenizer of config.init.from, or "
            "set 0"
        )
    if init.optimizer:
        if grown:
            raise UsageError(
                f"config.init.optimizer = True: {', '.join(grown)} are longer in this run, and "
                "have no moments for what is new; leave it out"
            )
        trees["train"] = parts.abstract._replace(params={}, ema={})

    loaded = source.restore(trees)
    params = loaded[item]
    check_finite(params, source.name)
    if grown:
        params = grow(parts.config.model, parts.config.seed, params, wanted)
    say(
        f"started from {source.name}"
        + (", averaged weights" if init.averaged else "")
        + (", with the optimiser's moments" if init.optimizer else "")
        + "".join(f"; {path} grew from {old} to {new} rows" for path, (old, new) in grown.items())
    )
    return Weights(params, loaded["train"].opt if init.optimizer else None)


def check_finite(params, name: str) -> None:
    """Raises UsageError, with all of them in a line, if weights are NaN or infinite.

    A run that starts from such weights would end at its first step, after it was compiled.
    """
    line = find_nonfinite(params)
    if line:
        raise UsageError(
            f"config.init.from: {line} of {name}; a run from there would have no loss; name "
            "another step, or other weights"
        )


def map_by_path(function, *trees):
    """`function(path, *leaves)` over trees of one structure."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(sharding.join_path(keys), *leaves), *trees
    )


def find_grown(saved: Mapping, wanted: Mapping) -> dict[str, tuple[int, int]]:
    """{path: (old length, new length)} of the parameters that are longer in this run.

    Raises UsageError for a shape that differs in any other way.
    """
    grown = {}

    def compare(path, old, new):
        if old.shape == new.shape:
            return
        axes = describe_parameter(path).axes
        for axis, before, after in zip(axes, old.shape, new.shape, strict=True):
            if before != after and (axis not in GROWING or before > after):
                raise UsageError(
                    f"config.init.from: {path} is {list(old.shape)} there and {list(new.shape)} "
                    "in this run; only the vocabulary and learned positions may grow"
                )
            if before != after:
                grown[path] = before, after

    map_by_path(compare, saved, wanted)
    return grown


def grow(model: configs.Model, seed: int, params, wanted):
    """`params` with the shapes of `wanted`; what is new is drawn as in a fresh run."""

    def lengthen(old, new):
        if old.shape == new.shape:
            return old
        widths = [(0, after - before) for before, after in zip(old.shape, new.shape, strict=True)]
        is_old = jnp.pad(jnp.ones(old.shape, bool), widths)
        padded = jnp.pad(old, widths)
        layout = jax.typeof(new).sharding
        return jnp.where(jax.reshard(is_old, layout), jax.reshard(padded, layout), new)

    def make(params):
        return jax.tree.map(lengthen, params, init_params(model, jax.random.key(seed)))

    grown = jax.jit(make)(params)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), grown, wanted)
