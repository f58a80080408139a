"""The reader of compiled programs, on programs whose collectives and FLOPs are known."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax.plan.program.groups import find_axes, read_groups
from gpt_jax.plan.program.program import read_program
from gpt_jax.plan.program.text import size_type
from gpt_jax.sharding.mesh import make_mesh


def compile_and_read(fn, shape, *arrays):
    """Reads `fn` as compiled for fake CPU devices; arrays: (dims, spec) in float32."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    with jax.set_mesh(mesh):
        given = [
            jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))
            for dims, spec in arrays
        ]
        text = jax.jit(fn).lower(*given).compile().as_text()
    return read_program(text, dict(mesh.shape))


def list_rows(program):
    return [(row.kind, row.axes, row.bytes, row.calls) for row in program.collectives]


def test_a_gather_in_a_loop_counts_as_often_as_it_runs():
    def fn(stack, x):
        def body(x, w):
            gathered = jax.reshard(w, P(None, None))
            return jnp.tanh(jnp.matmul(x, gathered, out_sharding=P("data", None))), None

        return jax.lax.scan(body, x, stack)[0]

    stack = ((6, 64, 64), P(None, "fsdp", None))
    x = ((16, 64), P("data", None))
    program = compile_and_read(fn, dict(data=2, fsdp=4), stack, x)
    assert list_rows(program) == [("all-gather", ("fsdp",), 64 * 64 * 4 * 3 // 4, 6)]


def test_loops_in_loops():
    def fn(x):
        def inner(x, _):
            return jax.lax.psum(x, "tensor") * 0.5, None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, 3)[0] + 1, None

        def local(x):
            return jax.lax.scan(outer, x, None, 5)[0]

        return jax.shard_map(local, in_specs=P(None), out_specs=P(None), check_vma=False)(x)

    program = compile_and_read(fn, dict(fsdp=2, tensor=4), ((128,), P(None)))
    assert list_rows(program) == [("all-reduce", ("tensor",), round(2 * 0.75 * 128 * 4), 15)]


def permute(x):
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])


def exchange(x):
    return jax.lax.all_to_all(x.reshape(4, 64), "fsdp", 0, 0).reshape(256)


def add(x):
    return jax.lax.psum(x, ("fsdp", "tensor"))


@pytest.mark.parametrize(
    "fn, want",
    [
        (permute, ("collective-permute", ("fsdp",), 256 * 4)),
        (exchange, ("all-to-all", ("fsdp",), 192 * 4)),
        (add, ("all-reduce", ("fsdp", "tensor"), round(2 * 7 / 8 * 256 * 4))),
    ],
)
def test_kinds_axes_and_bytes(fn, want):
    def mapped(x):
        return jax.shard_map(fn, in_specs=P(None), out_specs=P(None), check_vma=False)(x)

    program = compile_and_read(mapped, dict(fsdp=4, tensor=2), ((256,), P(None)))
    assert list_rows(program) == [(*want, 1)]


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
    assert size_type(text) == size


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match="'f6e3m2fn'"):
        size_type("(f32[4], f6e3m2fn[8])")


@pytest.mark.parametrize(
    "text, want",
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}",
            [[7, 6, 5, 4], [3, 2, 1, 0]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups_in_every_notation(text, want):
    assert read_groups(text).tolist() == want


def test_axes_of_groups():
    groups = read_groups("replica_groups=[2,4]<=[4,2]T(1,0)")
    assert find_axes(groups, {"fsdp": 4, "tensor": 2}) == ("fsdp",)
    assert find_axes(None, {"data": 1, "fsdp": 4, "tensor": 2}) == ("fsdp", "tensor")


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%start.1 (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p), \
channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %call.1 = (bf16[8,64], bf16[64,64]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%middle.1 (q: bf16[8,64]) -> bf16[64,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%q), \
channel_id=5, replica_groups=[1,8]<=[8],
  dimensions={0}
}

%body.1 (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %w = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%w), kind=kCustom, calls=%start.1
  %fusion.2 = bf16[64,64]{1,0} fusion(%w), kind=kOutput, calls=%middle.1, \
backend_config={"estimated_cycles":"100"}
  %all-reduce.9 = f32[16]{0} all-reduce(%w), \
channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add.1
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
  ROOT %copy.1 = bf16[8,64]{1,0} get-tuple-element(%while.1), index=1, \
backend_config={"estimated_cycles":"11"}
}
"""


def test_a_program_as_libtpu_writes_it():
    """An asynchronous gather stands in two fusions and is one.

    Cycles and calls count 7 times, because the loop's condition compares with 7.
    """
    program = read_program(TPU_TEXT, {"fsdp": 8})
    rows = [(row.kind, row.bytes, row.calls, row.asynchronous) for row in program.collectives]
    assert rows == [
        ("all-gather", 64 * 64 * 2 * 7 // 8, 7, True),
        ("all-reduce", round(16 * 4 * 2 * 7 / 8), 7, False),
    ]
    assert program.cycles == 7 * 100 + 11


SPARSE_TEXT = """HloModule jit_step, is_scheduled=true

%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)S(7)} parameter(0)
  %y = bf16[]{:T(256)S(7)} parameter(1)
  ROOT %add.62 = bf16[]{:T(256)S(7)} add(%x, %y), backend_config={"estimated_cycles":"1185"}
}, execution_thread="sparsecore"

%called_computation (p0: bf16[256,8192], p1: token[]) -> bf16[2048,8192] {
  %p1 = token[] parameter(1)
  %p0 = bf16[256,8192]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.24 = bf16[2048,8192]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=16, \
replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={0}, \
backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}
}, execution_thread="sparsecore"

%called_computation.4 (q0: bf16[2048,8192], q1: token[]) -> bf16[256,8192] {
  %q1 = token[] parameter(1)
  %q0 = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %fusion.3 = bf16[2048,8192]{1,0:T(8,128)(2,1)} fusion(%q0), kind=kLoop, calls=%fused.3, \
backend_config={"estimated_cycles":"5000"}
  ROOT %reduce-scatter.10 = bf16[256,8192]{1,0:T(8,128)(2,1)} reduce-scatter(%fusion.3), \
channel_id=9, replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, \
dimensions={0}, to_apply=%add.1, backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}
}, execution_thread="sparsecore"

%body.1 (t: (s32[], bf16[256,8192])) -> (s32[], bf16[256,8192]) {
  %t = (s32[], bf16[256,8192]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[256,8192]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %prepare = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %ready = token[] custom-call(%prepare), custom_call_target="PrepareAsyncCallDone"
  %gather = ((bf16[256,8192]{1,0:T(8,128)(2,1)}, token[]), bf16[2048,8192]{1,0:T(8,128)(2,1)}) \
call-start(%w, %ready), async_execution_thread="sparsecore", to_apply=%called_computation
  %gathered = bf16[2048,8192]{1,0:T(8,128)(2,1)} call-done(%gather)
  %fusion.55 = bf16[2048,8192]{1,0:T(8,128)(2,1)} fusion(%gathered), kind=kOutput, \
calls=%fused.55, backend_config={"estimated_cycles":"367190"}
  %scatter = ((bf16[2048,8192]{1,0:T(8,128)(2,1)}, token[]), bf16[256,8192]{1,0:T(8,128)(2,1)}) \
call-start(%fusion.55, %ready), async_execution_thread="sparsecore", to_apply=%called_computation.4
  %scattered = bf16[256,8192]{1,0:T(8,128)(2,1)} call-done(%scatter)
  ROOT %tuple.1 = (s32[], bf16[256,8192]{1,0:T(8,128)(2,1)}) tuple(%i, %scattered)
}

ENTRY %main.1 (a: bf16[256,8192]) -> bf16[256,8192] {
  %a = bf16[256,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %while.1 = (s32[], bf16[256,8192]{1,0}) while(%a), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"4"}}
  ROOT %out = bf16[256,8192]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_collectives_of_the_sparse_core_run_beside_the_matmuls():
    """A loop of 4 turns starts a gather and a sum there, as libtpu writes it for v6e.

    The cycles are those of the tensor core alone.
    """
    program = read_program(SPARSE_TEXT, {"data": 2, "fsdp": 8})
    rows = [
        (row.kind, row.axes, row.bytes, row.calls, row.asynchronous) for row in program.collectives
    ]
    sent = 2048 * 8192 * 2 * 7 // 8
    assert sorted(rows) == [
        ("all-gather", ("fsdp",), sent, 4, True),
        ("reduce-scatter", ("fsdp",), sent, 4, True),
    ]
    assert program.cycles == 4 * 367190


def test_collectives_of_a_computation_that_runs_asynchronously():
    """GPUs and TPUs write it as a start that `calls` or that applies the computation."""
    applied = SPARSE_TEXT.replace(" call-start(", " async-start(")
    called = applied.replace("to_apply=%called", "calls=%called")
    wanted = read_program(SPARSE_TEXT, {"data": 2, "fsdp": 8})
    assert read_program(applied, {"data": 2, "fsdp": 8}) == wanted
    assert read_program(called, {"data": 2, "fsdp": 8}) == wanted


DOT = """  %l = bf16[3,8,16]{2,1,0} parameter(1)
  %r = bf16[3,16,32]{2,1,0} parameter(2)
  %dot.1 = f32[3,8,32]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, rhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_contracting_dims={1}
"""


def test_flops_of_a_dot_in_a_loop():
    """The loop multiplies 3 matrices 8 x 16 with 16 x 32, 7 times."""
    text = TPU_TEXT.replace("  %all-reduce.9", DOT + "  %all-reduce.9")
    assert read_program(TPU_TEXT, {"fsdp": 8}).matmul_flops == 0
    assert read_program(text, {"fsdp": 8}).matmul_flops == 7 * 3 * 2 * 8 * 16 * 32


def test_flops_of_a_matmul_that_libtpu_writes_as_a_convolution():
    """It multiplies 13 matrices 8 x 16 with 16 x 32; the 13 are a dilated spatial dim."""
    text = """ENTRY %main.1 (a: bf16[13,8,16], b: bf16[13,16,32]) -> bf16[13,8,32] {
  %a = bf16[13,8,16]{2,1,0} parameter(0)
  %b = bf16[13,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[13,8,32]{2,1,0} convolution(%a, %b), \
window={size=13 stride=12 lhs_dilate=13}, dim_labels=0bf_0io->0bf
}
"""
    assert read_program(text, {"fsdp": 1}).matmul_flops == 2 * 13 * 8 * 16 * 32


def test_flops_of_a_matmul_that_libtpu_writes_as_a_padded_convolution():
    """It multiplies one matrix 8 x 16 with 24 matrices 16 x 32.

    The 24 are a window over a single entry, with 23 of padding around it.
    """
    text = """ENTRY %main.1 (a: bf16[8,16,1], b: bf16[24,32,16]) -> bf16[24,8,32] {
  %a = bf16[8,16,1]{1,0,2} parameter(0)
  %b = bf16[24,32,16]{1,2,0} parameter(1)
  ROOT %c = bf16[24,8,32]{2,1,0} convolution(%a, %b), \
window={size=24 pad=23_23 rhs_reversal=1}, dim_labels=bf0_0oi->0bf
}
"""
    assert read_program(text, {"fsdp": 1}).matmul_flops == 24 * 2 * 8 * 16 * 32


CUBLAS = """%step (i: s32[]) -> s32[] {
  %l = bf16[512,64]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} parameter(1)
  %call = (bf16[512,32]{1,0}, s8[4194304]{0}) custom-call(%l, %r), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}},"estimated_cycles":"9"}
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


def test_flops_of_calls_of_cublas_in_a_loop_whose_length_the_data_decides():
    program = read_program(CUBLAS, {"fsdp": 8})
    assert (program.matmul_flops, program.turn_flops) == (0, 2 * 512 * 64 * 32)
    assert program.cycles == 9


def test_flops_of_calls_of_cublas_in_a_loop_of_5_turns():
    trips = 'body=%step, backend_config={"known_trip_count":{"n":"5"}}'
    program = read_program(CUBLAS.replace("body=%step", trips), {"fsdp": 8})
    assert (program.matmul_flops, program.turn_flops) == (5 * 2 * 512 * 64 * 32, 0)
    assert program.cycles == 9 * 5


def test_a_call_of_cublas_that_is_no_matmul_has_no_flops():
    solved = CUBLAS.replace("lt$matmul", "triangularSolve")
    solved = solved.replace('"lhs_contracting_dimensions":["1"],', "")
    assert read_program(solved, {"fsdp": 8}).turn_flops == 0


GROUPED = """ENTRY %main (a: s32[]) -> bf16[512,32] {
  %groups = s32[9]{0} parameter(0)
  %rows = bf16[512,64]{1,0} parameter(1)
  %kernels = bf16[8,64,32]{2,1,0} parameter(2)
  %tgmm.2 = bf16[8,64,32]{2,1,0} custom-call(%groups, %rows, %ragged-dot-none.1), \
custom_call_target="tpu_custom_call"
  %other = bf16[512,32]{1,0} custom-call(%groups, %rows, %kernels), \
custom_call_target="tpu_custom_call"
  ROOT %ragged-dot-none.1 = bf16[512,32]{1,0} custom-call(%groups, %rows, %kernels), \
custom_call_target="tpu_custom_call"
}
"""


GROUPED_ON_GPU = """ENTRY %main (a: s32[]) -> bf16[512,32] {
  %sizes = s32[8]{0} parameter(0)
  %rows = bf16[512,64]{1,0} parameter(1)
  %kernels = bf16[8,64,32]{2,1,0} parameter(2)
  %pallas_call.2 = f32[8,64,32]{2,1,0} custom-call(%sizes, %sizes, %rows, %pallas_call.1), \
custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/transpose(jvp(experts_sum_products))/pallas_call"}
  %other = bf16[512,32]{1,0} custom-call(%sizes, %rows, %kernels), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/other/pallas_call"}
  ROOT %pallas_call.1 = bf16[512,32]{1,0} custom-call(%sizes, %sizes, %sizes, %rows, %kernels), \
custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/jvp(experts_multiply)/pallas_call"}
}
"""


@pytest.mark.parametrize("text", [GROUPED, GROUPED_ON_GPU], ids=["tpu", "gpu"])
def test_flops_of_grouped_matmuls_whose_kernels_carry_no_cycles(text):
    """512 rows go through 64 x 32 each, and their outer products are summed."""
    program = read_program(text, {"fsdp": 8})
    assert program.grouped_flops == 2 * 2 * 512 * 64 * 32
    assert program.matmul_flops == 0
