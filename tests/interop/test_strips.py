"""A copy in strips has the numbers of a plain copy."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gpt_jax.interop.strips import copy_into

SHAPE = (197, 135)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_copies_are_those_of_numpy(source, target):
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(ml_dtypes.bfloat16)
    values = values.astype(source)
    for view in (values, values.T, values.T[3:-2, 1:], values[::-1].T, values.T[::-1], values[0]):
        found = np.full(view.shape, np.nan, target)
        copy_into(found, view)
        np.testing.assert_array_equal(found, view.astype(target))


def test_a_strip_is_all_that_is_needed():
    """A transposed matrix is cast a strip at a time, so no second array of its size is made."""
    values = np.ones((1024, 1024), np.float32).T
    target = np.empty(values.shape, ml_dtypes.bfloat16)
    tracemalloc.start()
    copy_into(target, values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < target.nbytes / 4
