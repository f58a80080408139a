"""The reader of compiled programs against programs whose collectives and FLOPs are known."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax.plan import hlo
from gpt_jax.sharding.mesh import make_mesh


def program(fn, shape, *arrays):
    """What hlo.read finds in `fn` compiled for fake CPU devices; arrays: (dims, spec) in
    float32."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    with jax.set_mesh(mesh):
        given = [
            jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))
            for dims, spec in arrays
        ]
        text = jax.jit(fn).lower(*given).compile().as_text()
    return hlo.read(text, dict(mesh.shape))


def rows(found):
    return [(row.kind, row.axes, row.bytes, row.calls) for row in found.collectives]


def test_a_gather_in_a_loop_counts_as_often_as_it_runs():
    def fn(stack, x):
        def body(x, w):
            return (
                jnp.tanh(
                    jnp.matmul(x, jax.reshard(w, P(None, None)), out_sharding=P("data", None))
                ),
                None,
            )

        return jax.lax.scan(body, x, stack)[0]

    found = program(
        fn, dict(data=2, fsdp=4), ((6, 64, 64), P(None, "fsdp", None)), ((16, 64), P("data", None))
    )
    assert rows(found) == [("all-gather", ("fsdp",), 64 * 64 * 4 * 3 // 4, 6)]


def test_loops_in_loops():
    def fn(x):
        def inner(x, _):
            return (jax.lax.psum(x, "tensor") * 0.5, None)

        def outer(x, _):
            return (jax.lax.scan(inner, x, None, 3)[0] + 1, None)

        return jax.shard_map(
            lambda x: jax.lax.scan(outer, x, None, 5)[0],
            in_specs=P(None),
            out_specs=P(None),
            check_vma=False,
        )(x)

    found = program(fn, dict(fsdp=2, tensor=4), ((128,), P(None)))
    assert rows(found) == [("all-reduce", ("tensor",), round(2 * 0.75 * 128 * 4), 15)]


@pytest.mark.parametrize(
    "fn, want",
    [
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            ("collective-permute", ("fsdp",), 256 * 4),
        ),
        (
            lambda x: jax.lax.all_to_all(x.reshape(4, 64), "fsdp", 0, 0).reshape(256),
            ("all-to-all", ("fsdp",), 192 * 4),
        ),
        (
            lambda x: jax.lax.psum(x, ("fsdp", "tensor")),
            ("all-reduce", ("fsdp", "tensor"), round(2 * 7 / 8 * 256 * 4)),
        ),
    ],
)
def test_kinds_axes_and_bytes(fn, want):
    def mapped(x):
        return jax.shard_map(fn, in_specs=P(None), out_specs=P(None), check_vma=False)(x)

    assert rows(program(mapped, dict(fsdp=4, tensor=2), ((256,), P(None)))) == [(*want, 1)]


@pytest.mark.parametrize(
    "text, size",
    [
        ("(bf16[8,64]{1,0:T(8,128)}, f32[])", 1028),
        ("f8e4m3[8,2]", 16),
        ("f8e8m0fnu[3]", 3),
        ("f4e2m1fn[8]", 4),
        ("s2[8]", 2),
        ("u2[4]", 1),
        ("pred[3]", 3),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(text, size):
    assert hlo.size_of(text) == size


def test_a_type_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="'f6e3m2fn'"):
        hlo.size_of("(f32[4], f6e3m2fn[8])")


def test_replica_groups_in_every_notation():
    want = [[0, 2, 4, 6], [1, 3, 5, 7]]
    for text in (
        "replica_groups={{0,2,4,6},{1,3,5,7}}",
        "replica_groups=[2,4]<=[4,2]T(1,0)",
        "replica_groups=mesh['a'=4,'b'=2] {'a'}",
    ):
        assert hlo.groups(text).tolist() == want, text
    assert (
        hlo.groups("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}").tolist()
        == want
    )
    assert hlo.groups("replica_groups=mesh['a'=8] {'a':(1)4}").tolist() == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]
    assert hlo.groups("source_target_pairs={{0,1},{1,0}}").tolist() == [[0, 1], [1, 0]]
    assert hlo.axes_of(
        hlo.groups("replica_groups=[2,4]<=[4,2]T(1,0)"), {"fsdp": 4, "tensor": 2}
    ) == ("fsdp",)


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%start.1 (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %call.1 = (bf16[8,64], bf16[64,64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle.1 (q: bf16[8,64]) -> bf16[64,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=5, replica_groups=[1,8]<=[8],
  dimensions={0}
}

%body.1 (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %w = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%w), kind=kCustom, calls=%start.1
  %fusion.2 = bf16[64,64]{1,0} fusion(%w), kind=kOutput, calls=%middle.1, backend_config={"estimated_cycles":"100"}
  %all-reduce.9 = f32[16]{0} all-reduce(%w), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add.1
  ROOT %tuple.1 = (s32[], bf16[8,64]{1,0}) tuple(%w, %w)
}

%condition.1 (t: (s32[], bf16[8,64])) -> pred[] {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main.1 (a: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple.2 = (s32[], bf16[8,64]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[], bf16[8,64]{1,0}) while(%tuple.2), condition=%condition.1, body=%body.1
  ROOT %copy.1 = bf16[8,64]{1,0} get-tuple-element(%while.1), index=1, backend_config={"estimated_cycles":"11"}
}
"""


def test_a_program_as_libtpu_writes_it():
    """An asynchronous gather stands in two fusions and is one; cycles and calls of a loop whose
    condition compares with 7."""
    found = hlo.read(TPU_TEXT, {"fsdp": 8})
    assert [(row.kind, row.bytes, row.calls, row.asynchronous) for row in found.collectives] == [
        ("all-gather", 64 * 64 * 2 * 7 // 8, 7, True),
        ("all-reduce", round(16 * 4 * 2 * 7 / 8), 7, False),
    ]
    assert found.cycles == 7 * 100 + 11


def test_flops_of_a_dot_in_a_loop():
    """7 times 3 matrices 8 x 16 times 16 x 32: the batch dim 0 stays, dim 2 of the one meets dim
    1 of the other."""
    text = TPU_TEXT.replace(
        "  %all-reduce.9",
        """  %l = bf16[3,8,16]{2,1,0} parameter(1)
  %r = bf16[3,16,32]{2,1,0} parameter(2)
  %dot.1 = f32[3,8,32]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, """
        """rhs_contracting_dims={1}
  %all-reduce.9""",
    )
    assert hlo.read(TPU_TEXT, {"fsdp": 8}).matmul_flops == 0
    assert hlo.read(text, {"fsdp": 8}).matmul_flops == 7 * 3 * 2 * 8 * 16 * 32


def test_flops_of_a_matmul_that_libtpu_writes_as_a_convolution():
    """13 matrices 8 x 16 times 16 x 32, the 13 as a dilated spatial dim."""
    text = """ENTRY %main.1 (a: bf16[13,8,16], b: bf16[13,16,32]) -> bf16[13,8,32] {
  %a = bf16[13,8,16]{2,1,0} parameter(0)
  %b = bf16[13,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[13,8,32]{2,1,0} convolution(%a, %b), window={size=13 stride=12 lhs_dilate=13}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.read(text, {"fsdp": 1}).matmul_flops == 2 * 13 * 8 * 16 * 32


def test_flops_of_a_matmul_that_libtpu_writes_as_a_padded_convolution():
    """One matrix 8 x 16 times 24 matrices 16 x 32, the 24 as a window over a single entry with
    23 of padding around it."""
    text = """ENTRY %main.1 (a: bf16[8,16,1], b: bf16[24,32,16]) -> bf16[24,8,32] {
  %a = bf16[8,16,1]{1,0,2} parameter(0)
  %b = bf16[24,32,16]{1,2,0} parameter(1)
  ROOT %c = bf16[24,8,32]{2,1,0} convolution(%a, %b), window={size=24 pad=23_23 rhs_reversal=1}, dim_labels=bf0_0oi->0bf
}
"""
    assert hlo.read(text, {"fsdp": 1}).matmul_flops == 24 * 2 * 8 * 16 * 32


CUBLAS = (
    """%step (i: s32[]) -> s32[] {
  %l = bf16[512,64]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} parameter(1)
  %call = (bf16[512,32]{1,0}, s8[4194304]{0}) custom-call(%l, %r), custom_call_target="__cublas$lt$matmul", """
    """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"""
    """"rhs_contracting_dimensions":["0"]}},"estimated_cycles":"9"}
}

%until (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  ROOT %w = s32[] while(%a), condition=%until, body=%step
}
"""
)


@pytest.mark.parametrize("known, flops", [(False, (0, 1)), (True, (5, 0))])
def test_flops_of_calls_of_cublas(known, flops):
    """2 x 512 x 64 x 32 a turn, and a loop whose length the data decides counts apart."""
    found = hlo.read(
        CUBLAS.replace(
            "body=%step", """body=%step, backend_config={"known_trip_count":{"n":"5"}}"""
        )
        if known
        else CUBLAS,
        {"fsdp": 8},
    )
    assert (found.matmul_flops, found.turn_flops) == tuple(n * 2 * 512 * 64 * 32 for n in flops)
    assert found.cycles == 9 * sum(flops)


GROUPED = """ENTRY %main (a: s32[]) -> bf16[512,32] {
  %groups = s32[9]{0} parameter(0)
  %rows = bf16[512,64]{1,0} parameter(1)
  %kernels = bf16[8,64,32]{2,1,0} parameter(2)
  %tgmm.2 = bf16[8,64,32]{2,1,0} custom-call(%groups, %rows, %ragged-dot-none.1), custom_call_target="tpu_custom_call"
  %other = bf16[512,32]{1,0} custom-call(%groups, %rows, %kernels), custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.1 = bf16[512,32]{1,0} custom-call(%groups, %rows, %kernels), custom_call_target="tpu_custom_call"
}
"""


def test_flops_of_grouped_matmuls_whose_kernels_carry_no_cycles():
    """512 rows through 64 x 32 each, and the sum of their outer products."""
    found = hlo.read(GROUPED, {"fsdp": 8})
    assert (found.grouped_flops, found.matmul_flops) == (2 * 2 * 512 * 64 * 32, 0)


def test_a_call_of_cublas_that_is_no_matmul_has_no_flops():
    solved = CUBLAS.replace("lt$matmul", "triangularSolve").replace(
        '"lhs_contracting_dimensions":["1"],', ""
    )
    assert hlo.read(solved, {"fsdp": 8}).turn_flops == 0
