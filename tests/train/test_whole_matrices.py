"""Functions of whole matrices, on one device and on stacks that are cut over a mesh."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax.train.optim.whole_matrices import on_whole_matrices, takers

FSDP = ("fsdp", "expert", "context")
INNER = ("fsdp", "context")
# q and o are each other's transpose, laid out so; three and five layers divide no axis. Experts in
# layers, and in one alone; layers of a pipeline's stages.
STACKS = {
    "q": ((3, 8, 8), P(None, FSDP, "tensor")),
    "o": ((3, 8, 8), P(None, "tensor", FSDP)),
    "up": ((5, 8, 16), P(None, FSDP, "tensor")),
    "down": ((5, 16, 8), P(None, "tensor", FSDP)),
    "kv": ((1, 8, 4), P(None, FSDP, None)),
    "whole": ((2, 4, 8), P(None, None, None)),
    "experts_up": ((3, 4, 8, 24), P(None, "expert", INNER, "tensor")),
    "experts_down": ((3, 4, 24, 8), P(None, "expert", "tensor", INNER)),
    "last": ((4, 8, 24), P("expert", INNER, "tensor")),
    "staged": ((4, 8, 20), P("pipeline", FSDP, None)),
}


@pytest.mark.parametrize(
    "count, sizes, wanted",
    [
        (156, {"fsdp": 128}, ("fsdp",)),
        (26, {"fsdp": 64, "data": 4}, ("fsdp",)),
        (4, {"fsdp": 2, "tensor": 2, "data": 2}, ("fsdp", "tensor")),
        (1, {"fsdp": 8}, ()),
        (7, {"data": 2, "pipeline": 2}, ("data", "pipeline")),
        (3, {"expert": 2, "fsdp": 3, "data": 2}, ("expert", "fsdp")),
    ],
)
def test_axes_that_leave_a_device_fewer_matrices(count, sizes, wanted):
    assert takers(count, sizes) == wanted


@pytest.mark.parametrize(
    "shape",
    [
        dict(fsdp=8),
        dict(fsdp=2, tensor=2, data=2),
        dict(data=8),
        dict(expert=2, context=2, tensor=2),
        dict(expert=4, fsdp=2),
        dict(pipeline=2, fsdp=4),
    ],
)
def test_every_matrix_is_whole_on_one_device(shape, mesh):
    """Stacks of matrices come back right and laid out as before.

    No device has more than its share of the work.
    """
    draw = np.random.default_rng(0)
    seen = []
    values = {
        name: draw.standard_normal(shape).astype(np.float32) for name, (shape, _) in STACKS.items()
    }

    def cube(x):
        *_, rows, columns = jax.typeof(x).sharding.spec
        assert rows is columns is None
        seen.append(math.prod(jax.typeof(x).sharding.shard_shape(x.shape)[:-2]))
        return x @ x.swapaxes(-1, -2) @ x

    grid = mesh(**shape)
    with jax.set_mesh(grid):
        stacks = [
            jax.device_put(values[name], NamedSharding(grid, spec))
            for name, (_, spec) in STACKS.items()
        ]
        step = jax.jit(lambda stacks: on_whole_matrices(cube, stacks)).lower(stacks).compile()
        found = step(stacks)
    for name, made, stack in zip(STACKS, found, stacks, strict=False):
        np.testing.assert_allclose(
            made, values[name] @ values[name].swapaxes(-1, -2) @ values[name], rtol=1e-5, atol=1e-4
        )
        assert made.sharding == stack.sharding, name
    assert sorted(seen) == [1, 1, 1, 1, 2, 4]  # an eighth each of 1, 2, 4, 6, 10 and 28
    if list(shape) == ["fsdp"]:
        assert " all-to-all(" in step.as_text()
        # Gathered are the matrix alone, and the stack that all devices hold.
        assert step.as_text().count(" all-gather(") == 2


def test_one_device_takes_stacks_as_they_are(mesh):
    """There is no mesh, or one of a single device, on which stacks are cut by their types alone."""
    stacks = [np.ones((2, 3, 4), np.float32), np.ones((1, 4, 3), np.float32)]
    shapes = []
    assert len(on_whole_matrices(lambda x: shapes.append(x.shape) or x, stacks)) == 2
    assert shapes == [(2, 3, 4), (1, 4, 3)]

    grid = mesh()
    with jax.set_mesh(grid):
        stack = jax.device_put(
            np.arange(24.0, dtype=np.float32).reshape(2, 3, 4),
            NamedSharding(grid, P(None, FSDP, "tensor")),
        )
        (square,) = jax.jit(lambda x: on_whole_matrices(lambda x: x @ x.swapaxes(-1, -2) @ x, [x]))(
            stack
        )
    np.testing.assert_allclose(
        square, np.asarray(stack) @ np.asarray(stack).swapaxes(-1, -2) @ np.asarray(stack)
    )
    assert square.sharding == stack.sharding
