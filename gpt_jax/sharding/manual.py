"""Functions that run on each device's own shard, or on the rows of each copy of the weights."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from gpt_jax.config import BATCH_AXES, COPY_AXES
from gpt_jax.sharding.layout import constrain
from gpt_jax.sharding.rules import _CHANGED, STAGE, _mesh, axis_size, used_spec


def sum_over_copies(fn: Callable) -> Callable:
    """`fn(params, frozen, columns, key) -> sums`, run on each copy's rows and summed over copies.

    The copies lie over COPY_AXES, and each has the weights whole. `columns` are [count, B, …], with
    B cut over the mesh. Nothing is sent between copies until `fn` has ended. A random number that
    `fn` draws is the same on every copy.
    """
    axes = tuple(axis for axis in COPY_AXES if axis_size(axis) > 1)
    if not axes:
        return fn
    others = tuple(axis for axis in BATCH_AXES if axis not in axes)

    def run_on_copy(*args):
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), fn(*args))

    def run(params, frozen, columns, key):
        # The other axes of rows have one device each, so that nothing moves here.
        columns = jax.tree.map(lambda x: jax.reshard(x, P(None, (*axes, *others))), columns)
        mapped = jax.shard_map(
            run_on_copy,
            axis_names=set(axes),
            in_specs=(P(), P(), P(None, axes), P()),
            out_specs=P(),
            check_vma=False,
        )
        return mapped(params, frozen, columns, key)

    return run


def run_local(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """`fn` run on each device's own shard by `jax.shard_map`.

    `in_axes` has the logical axes of each argument. The arguments are laid out by the USED rules
    first. An argument that is None has None for its axes. `out_axes` has the axes of the result,
    or is a tuple of such axes if `fn` returns several arrays.
    """
    if _mesh() is None:
        return fn

    def as_spec(axes):
        return P() if axes is None else used_spec(*axes)

    in_specs = tuple(map(as_spec, in_axes))
    if isinstance(out_axes[0], tuple):
        out_specs = tuple(map(as_spec, out_axes))
    else:
        out_specs = as_spec(out_axes)

    mapped = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if _CHANGED.get().items() >= STAGE.items():
        mapped = _by_stage(fn, mapped, in_specs, out_specs)

    def run(*args):
        pairs = zip(args, in_axes, strict=True)
        return mapped(*(x if axes is None else constrain(x, *axes) for x, axes in pairs))

    return run


def _by_stage(fn: Callable, mapped: Callable, in_specs: tuple, out_specs) -> Callable:
    """`mapped`, which is `fn` on shards, under a vmap over a pipeline's stages.

    Each device has one stage. JAX 0.10's own rule for the vmap of a shard_map gathers every
    argument over the stages and leaves out the axis `pipeline`. Code that runs only on single
    devices, such as Pallas kernels and ragged collectives, fails under that rule.
    """
    run = jax.custom_batching.custom_vmap(mapped)

    def over_pipeline(spec):
        return P("pipeline", *spec)

    @run.def_vmap
    def run_stages(size, batched, *args):
        def run_own_stage(*args):
            own = (x[0] if many else x for x, many in zip(args, batched, strict=True))
            return jax.tree.map(lambda y: y[None], fn(*own))

        specs = tuple(
            over_pipeline(spec) if many else spec
            for spec, many in zip(in_specs, batched, strict=True)
        )
        out = jax.tree.map(over_pipeline, out_specs, is_leaf=lambda x: isinstance(x, P))
        on_stages = jax.shard_map(run_own_stage, in_specs=specs, out_specs=out, check_vma=False)
        results = on_stages(*args)
        return results, jax.tree.map(lambda _: True, results)

    return run
