"""Intermediate values of a forward pass, asked for by name.

A name is a path, such as `blocks/0/residual`, or a pattern of fnmatch, such as `blocks/*/residual`:

- `blocks/<i>/residual`, `tail/<i>/residual`: the stream [B, T, D] after a layer;
- `blocks/<i>/attention/weights`: the attention map [B, N, T, S] in float32, of the kernel
  `reference` alone, because the others never have it whole;
- the path of a module, such as `blocks/<i>/mlp`, `embed` or `final_norm`: what it returns.

Values below `blocks` are stacked over the repeats of the scan, [repeats, …]. Layer `r * period + i`
is repeat `r` of `blocks/<i>`, see `list_layers`.

Shapes: B batch, T query, S key, D embed, N heads.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import flax.linen as nn
import jax

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.model.attention.attention import MAPS
from gpt_jax.model.attention.kernels import KERNELS
from gpt_jax.model.layers.embed import Head
from gpt_jax.model.layers.linear import Weights
from gpt_jax.model.transformer import Block, Period, Transformer

STREAMS = "intermediates"
NEAREST = 3  # names that an error lists

# Modules whose result is no value of the forward pass, or has a better name.
UNNAMED = (Block, Period, Transformer, Weights, Head)


def capture(
    model: config.Model,
    compute: config.Compute,
    params: Any,
    batch: dict,
    names: Sequence[str],
) -> dict[str, jax.Array]:
    """The values that `names` match, by their full names. Call it under jit.

    `batch` is what `Transformer.features` takes. Dropout is off. Raises UsageError for a name that
    matches nothing, and for attention maps of a kernel that has none. It also does so on a mesh
    with pipeline stages, because their layers keep nothing.
    """
    if sharding.axis_size("pipeline") > 1:
        raise UsageError(
            "config.mesh.pipeline: layers on stages keep no intermediate values; use a mesh "
            "without it, as load_model does"
        )
    wanted = _match(names, list_names(model, compute, params, batch))
    has_maps = any(_is_map(name) for name in wanted)
    if has_maps and KERNELS[compute.kernel].weights is None:
        raise UsageError(
            f"config.compute.kernel = {compute.kernel!r}: has no attention map to give; use "
            "kernel='reference', as in dataclasses.replace(compute, kernel='reference')"
        )
    values = _collect(model, compute, params, batch, wanted, has_maps)
    return {name: values[name] for name in wanted}


def list_names(
    model: config.Model, compute: config.Compute, params: Any, batch: dict
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every name that `capture` knows, with its shape. Computes nothing."""
    plain = replace(compute, kernel="reference")

    def collect(params, batch):
        with sharding.using_rules(sharding.WHOLE_ROWS):
            return _collect(model, plain, params, batch, None, True)

    return jax.eval_shape(collect, params, batch)


def list_layers(values: Mapping[str, jax.Array], what: str) -> list[jax.Array]:
    """What `capture` gave for `blocks/*/<what>` and `tail/*/<what>`, a value a layer, in order."""

    def pick(room):
        named = {}
        for name, value in values.items():
            start, _, rest = name.partition("/")
            number, _, rest = rest.partition("/")
            if start == room and rest == what:
                named[int(number)] = value
        return [named[i] for i in sorted(named)]

    period = pick("blocks")
    repeats = period[0].shape[0] if period else 0
    layers = [stack[repeat] for repeat in range(repeats) for stack in period]
    return layers + pick("tail")


def _match(names: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The known names that `names` match. Raises UsageError for one that matches none."""
    matched = []
    for name in names:
        found = [full for full in known if fnmatchcase(full, name)]
        if not found:
            nearest = difflib.get_close_matches(name, known, NEAREST, 0)
            raise UsageError(
                f"taps: {name!r} is no value of this model; nearest: {', '.join(nearest)}"
            )
        matched += found
    return list(dict.fromkeys(matched))


def _is_map(name: str) -> bool:
    return name.endswith("/weights")


def _collect(model, compute, params, batch, wanted, has_maps: bool) -> dict[str, jax.Array]:
    """{name: value} of a forward pass. With `wanted` no other modules are looked at."""

    def is_wanted(module: nn.Module, method: str) -> bool:
        if method != "__call__" or isinstance(module, UNNAMED):
            return False
        return wanted is None or "/".join(module.path) in wanted

    collections = [STREAMS, MAPS] if has_maps else [STREAMS]
    _, kept = Transformer(model, compute).apply(
        {"params": params},
        batch,
        method="features",
        mutable=collections,
        capture_intermediates=is_wanted,
    )
    values = {}
    for collection in collections:
        values |= _flatten(cast(Mapping, kept.get(collection, {})), ())
    return values


def _flatten(tree: Mapping, path: tuple[str, ...]) -> dict[str, jax.Array]:
    """The tree of Flax as {name: value}.

    Of several calls of a module it is the last, and of several results the first.
    """
    values = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= _flatten(value, (*path, key))
            continue
        name = path if key == "__call__" else (*path, key)
        result = value[-1]
        values["/".join(name)] = result[0] if isinstance(result, tuple) else result
    return values
