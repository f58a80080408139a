"""What is rounded to fp8: the plan's count, against the traced program."""

import pytest
from plans import ONE, changed
from programs import trace_layers
from test_named_values import DENSE, LENGTH, ROWS, SPARSE, shrink

from gpt_jax.plan import roofline
from gpt_jax.plan.microbatch import split_microbatch
from gpt_jax.plan.topology import parse_topology

TOKENS = ROWS * LENGTH


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
@pytest.mark.parametrize("name, overrides", [("llama:1b", DENSE), ("moe:8x7b", SPARSE)])
def test_entries_are_those_that_the_traced_layers_round(name, overrides, remat):
    compute = dict(dtype="bfloat16", matmul_dtype="fp8", kernel="splash", remat=remat)
    job = changed(shrink(name, *overrides), compute=compute)
    traced = 0
    for equation in trace_layers(job.config.model, job.config.compute, ROWS):
        if equation.primitive.name == "convert_element_type":
            result = equation.outvars[0].aval
            traced += result.size * ("float8" in str(result.dtype))

    # The scan over the layers is traced once.
    counted = roofline.count_fp8_entries(job, TOKENS) / job.config.model.layers
    assert counted == traced


def test_rounding_takes_passes_over_memory():
    """Five bytes an entry of bfloat16: read for the largest, read again, written."""
    wide = changed(shrink("llama:1b", *DENSE), compute=dict(dtype="bfloat16", remat="block"))
    narrow = changed(wide, compute=dict(matmul_dtype="fp8"))
    machine = parse_topology("h200:8")
    here = split_microbatch(wide, ONE)
    times = [
        roofline.passes_seconds(job, machine, "reference", ONE, here) for job in (wide, narrow)
    ]
    entries = roofline.count_fp8_entries(narrow, TOKENS)
    assert times[1] - times[0] == pytest.approx(5 * entries / machine.chip.bandwidth)
    assert roofline.count_fp8_entries(wide, TOKENS) == 0
