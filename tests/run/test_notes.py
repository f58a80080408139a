"""The lines at the start of a run say what its program does."""

import re

import jax
import pytest
import runs

from gpt_jax.run.notes import describe_dtypes


@pytest.mark.parametrize("dtype, short", [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_are_summed_in_the_dtype_that_the_line_names(tmp_path, dtype, short):
    config = runs.load(tmp_path, f"--config.compute.dtype={dtype}", "--config.train.loss_chunk=0")
    parts = runs.build(config, fsdp=2)
    size = config.train.batch_size
    columns = next(iter(runs.make_stream(parts.examples, size, slice(0, size))))
    with jax.set_mesh(parts.mesh):
        batch = runs.rows.to_devices(parts.mesh, columns, size)
        text = str(parts.train_step.trace(parts.abstract, batch).jaxpr)
    summed = set(re.findall(r":(\w+)\[[^]]*\][^=]*= \w*reduce_scatter", text))
    assert summed - {"f32"} == {short} - {"f32"}  # embeddings are looked up in float32

    line = describe_dtypes(config.compute)
    if short == "f32":
        assert line == "float32 compute, parameters and sums"
    else:
        assert line.endswith("devices sum the gradients of matmuls in bfloat16")
