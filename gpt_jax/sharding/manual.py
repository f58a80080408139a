"""Functions that run on each device's own shard."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from gpt_jax.sharding.layout import constrain
from gpt_jax.sharding.rules import _CHANGED, STAGE, _mesh, used_spec


def run_local(fn: Callable, in_axes: tuple, out_axes: tuple) -> Callable:
    """`fn` run on each device's own shard (jax.shard_map). `in_axes`: the logical axes of each
    argument, which is laid out by the USED rules first, or None for an argument that is None;
    `out_axes`: of the result, or a tuple of them."""
    if _mesh() is None:
        return fn

    def as_spec(axes):
        return P() if axes is None else used_spec(*axes)

    many = isinstance(out_axes[0], tuple)
    specs = (
        tuple(map(as_spec, in_axes)),
        tuple(map(as_spec, out_axes)) if many else as_spec(out_axes),
    )
    mapped = jax.shard_map(fn, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    if _CHANGED.get().items() >= STAGE.items():
        mapped = _by_stage(fn, mapped, *specs)

    def run(*args):
        return mapped(
            *(
                x if axes is None else constrain(x, *axes)
                for x, axes in zip(args, in_axes, strict=True)
            )
        )

    return run


def _by_stage(fn: Callable, mapped: Callable, in_specs: tuple, out_specs) -> Callable:
    """`mapped` (`fn` on shards) for the vmap over a pipeline's stages, of which each device has
    one. Left to itself the vmap of a shard_map (JAX 0.10) gathers every argument over the
    stages, and leaves out the axis pipeline, which what runs on single devices only (Pallas
    kernels, ragged collectives) does not bear."""
    run, over = jax.custom_batching.custom_vmap(mapped), lambda spec: P("pipeline", *spec)

    @run.def_vmap
    def staged(size, batched, *args):
        def one(*args):
            own = (x[0] if many else x for x, many in zip(args, batched))
            return jax.tree.map(lambda y: y[None], fn(*own))

        specs = tuple(over(spec) if many else spec for spec, many in zip(in_specs, batched))
        out = jax.tree.map(over, out_specs, is_leaf=lambda x: isinstance(x, P))
        found = jax.shard_map(one, in_specs=specs, out_specs=out, check_vma=False)(*args)
        return found, jax.tree.map(lambda _: True, found)

    return run
