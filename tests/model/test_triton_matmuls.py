"""Triton's grouped matmul of experts, interpreted, against XLA's; and as it lowers for GPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_layers import close
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from gpt_jax.model.experts.triton_matmuls import (
    SIDE,
    _list_tiles,
    grouped_dot,
    multiply,
    sum_products,
)

M = 3 * SIDE  # Tiles that begin elsewhere go beyond the last row.
IN = 48  # Tiles are 16 wide.
OUT = 160  # Tiles are 32 wide, and there are five.
SIZES = {
    "crossing": [100, 0, 190, 7, 50],
    "full": [0, SIDE, 0, 2 * SIDE, 0],
    "one": [0, 0, 0, 0, M],
    "last-rows": [1, 0, 0, 300, M - 301],
    "none": [0, 0, 0, 0, 0],
}


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels run on the CPU. What they leave unwritten is NaN."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def draw(dtype):
    """(rows [M, IN], kernel [5, IN, OUT] of float32, probe [M, OUT])."""
    rng = np.random.default_rng(0)
    shapes = ((M, IN), (5, IN, OUT), (M, OUT))
    rows, kernel, probe = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return jnp.asarray(rows, dtype), jnp.asarray(kernel), jnp.asarray(probe, dtype)


def spoil(rows, total: int):
    """`rows` with NaN beyond the groups, where kernels leave anything."""
    return jnp.where(jnp.arange(len(rows))[:, None] < total, rows, jnp.nan)


def cut(rows, total: int):
    return np.asarray(rows[:total], np.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_both_gradients_are_those_of_xla(sizes, interpreted):
    rows, kernel, probe = draw(jnp.float32)
    groups = jnp.asarray(sizes, jnp.int32)
    total = sum(sizes)

    def both(dot, rows, kernel, probe):
        product, transpose = jax.vjp(lambda rows, kernel: dot(rows, kernel, groups), rows, kernel)
        return product, transpose(probe)

    mine = both(grouped_dot, spoil(rows, total), kernel, spoil(probe, total))
    product, (to_rows, to_kernel) = both(jax.lax.ragged_dot, rows, kernel, probe)
    close(cut(mine[0], total), cut(product, total)) if total else None
    close(cut(mine[1][0], total), cut(to_rows, total)) if total else None
    close(mine[1][1], to_kernel)


def test_rows_of_no_group_take_no_tile_and_are_not_written(interpreted):
    """A buffer for tokens of other devices is mostly empty, and its tiles must cost nothing."""
    rows, kernel, _ = draw(jnp.float32)
    sizes = jnp.asarray([3, 0, SIDE + 1, 0, 4], jnp.int32)
    group, first, end = _list_tiles(sizes, M)
    assert group[first < end].tolist() == [0, 2, 2, 4]

    product = multiply(rows, kernel, sizes)
    total = sum(sizes.tolist())
    assert np.isfinite(product[:total]).all() and np.isnan(product[total:]).all()


def test_sums_of_bfloat16_are_float32(interpreted):
    """bfloat16 has no 383, which the products of 383 ones add up to."""
    rows, _, _ = draw(jnp.bfloat16)
    ones = jnp.ones_like(rows)
    sizes = jnp.asarray([M - 1, 0], jnp.int32)
    found = sum_products(ones, ones, sizes, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.stack([np.full((IN, IN), M - 1), np.zeros((IN, IN))]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_gpus_as_three_kernels(dtype):
    """No GPU is needed to lower, and neither is CUDA. Only JAX 0.12 asks for the GPU's kind."""
    rows, kernel, probe = draw(dtype)

    def both(rows, kernel, sizes, probe):
        product, transpose = jax.vjp(partial(grouped_dot, sizes=sizes), rows, kernel)
        return product, transpose(probe)

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(both).trace(rows, kernel, jnp.zeros(5, jnp.int32), probe)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert "ragged_dot" not in text and "stablehlo.dot_general" not in text


def test_what_triton_does_not_multiply_is_refused():
    rows, kernel, _ = draw(jnp.float32)
    sizes = jnp.asarray([M, 0, 0, 0, 0], jnp.int32)
    with pytest.raises(ValueError, match=r"a width of experts is 24: .* divisible by 16"):
        grouped_dot(rows, kernel[:, :, :24], sizes)
