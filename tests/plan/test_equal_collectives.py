"""Equal collectives of a program count each, whatever channel the compiler gives them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax.plan.program.program import read_program
from gpt_jax.sharding.mesh import make_mesh


def gather(x):
    return jax.lax.all_gather(x, "fsdp", tiled=True)[:256]


def add(x):
    return jax.lax.psum(x, "fsdp")


def scatter(x):
    return jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), 4)


def exchange(x):
    return jax.lax.all_to_all(x.reshape(4, 64), "fsdp", 0, 0).reshape(256)


def permute(x):
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])


@pytest.mark.parametrize(
    "fn, kind",
    [
        (gather, "all-gather"),
        (add, "all-reduce"),
        (scatter, "reduce-scatter"),
        (exchange, "all-to-all"),
        (permute, "collective-permute"),
    ],
)
def test_two_equal_collectives_are_two(fn, kind):
    mesh = make_mesh(dict(fsdp=4, tensor=2), jax.devices()[:8])

    def send_twice(x):
        return fn(jnp.tanh(fn(x)))

    def mapped(x):
        return jax.shard_map(send_twice, in_specs=P(None), out_specs=P(None), check_vma=False)(x)

    with jax.set_mesh(mesh):
        given = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh, P(None)))
        text = jax.jit(mapped).lower(given).compile().as_text()

    # The compiler gives both one channel, which is what this test is about.
    assert text.count("channel_id=1,") == 2 and "channel_id=2" not in text
    program = read_program(text, dict(mesh.shape))
    assert [(row.kind, row.calls) for row in program.collectives] == [(kind, 2)]


GATHER = "bf16[64,64]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}"
START = 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'
# One gather starts in a fusion and goes on in another. Two more wait where they stand.
MIXED = f"""HloModule jit_f, is_scheduled=true

%start (p: bf16[8,64]) -> bf16[64,64] {{
  %p = bf16[8,64]{{1,0}} parameter(0)
  %g = {GATHER}
  ROOT %call = (bf16[8,64], bf16[64,64]) {START}
}}

%middle (p: bf16[8,64]) -> bf16[64,64] {{
  %p = bf16[8,64]{{1,0}} parameter(0)
  ROOT %g = {GATHER}
}}

ENTRY %main (p: bf16[8,64]) -> bf16[64,64] {{
  %p = bf16[8,64]{{1,0}} parameter(0)
  %one = {GATHER}
  %fusion.1 = (bf16[8,64], bf16[64,64]) fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = bf16[64,64] fusion(%p), kind=kOutput, calls=%middle
  ROOT %two = {GATHER}
}}
"""


def test_equal_collectives_of_which_one_is_asynchronous():
    program = read_program(MIXED, {"fsdp": 8})
    rows = [(row.kind, row.calls, row.asynchronous) for row in program.collectives]
    assert sorted(rows) == [("all-gather", 1, True), ("all-gather", 2, False)]


ASYNC = """HloModule jit_f, is_scheduled=true

%wrapped (p: f32[8,64]) -> f32[8,64] {
  %p = f32[8,64]{1,0} parameter(0)
  ROOT %sent = f32[8,64] all-to-all(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8,64]) -> f32[8,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %begun = ((f32[8,64]), f32[8,64]) async-start(%p), calls=%wrapped
  %going = ((f32[8,64]), f32[8,64]) async-update(%begun), calls=%wrapped
  ROOT %ended = f32[8,64] async-done(%going), calls=%wrapped
}
"""


def test_the_end_of_an_asynchronous_collective_is_not_another_one():
    program = read_program(ASYNC, {"fsdp": 8})
    rows = [(row.kind, row.calls, row.asynchronous) for row in program.collectives]
    assert rows == [("all-to-all", 1, True)]
