"""What the cycles of a program are spent on."""

from gpt_jax.plan.lines import _format_work
from gpt_jax.plan.program.program import read_program
from gpt_jax.plan.topology import parse_topology

TEXT = """HloModule jit_f, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%inner (p: bf16[512,512]) -> bf16[512,512] {
  %p = bf16[512,512]{1,0} parameter(0)
  ROOT %c = bf16[512,512]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%outer (p: bf16[512,512]) -> bf16[512,512] {
  %p = bf16[512,512]{1,0} parameter(0)
  %nested = bf16[512,512]{1,0} fusion(%p), kind=kOutput, calls=%inner
  ROOT %square = bf16[512,512]{1,0} multiply(%nested, %nested)
}

%moving (p: bf16[512,512]) -> bf16[512,512] {
  %p = bf16[512,512]{1,0} parameter(0)
  %turned = bf16[512,512]{1,0} transpose(%p), dimensions={1,0}
  ROOT %cut = bf16[512,512]{1,0} dynamic-slice(%turned)
}

%doubling (p: bf16[512,512]) -> bf16[512,512] {
  %p = bf16[512,512]{1,0} parameter(0)
  ROOT %twice = bf16[512,512]{1,0} add(%p, %p)
}

%body (t: (s32[], bf16[512,512])) -> (s32[], bf16[512,512]) {
  %t = (s32[], bf16[512,512]{1,0}) parameter(0)
  %w = bf16[512,512]{1,0} get-tuple-element(%t), index=1
  %f1 = bf16[512,512] fusion(%w), calls=%outer, backend_config={"estimated_cycles":"1000"}
  %f2 = bf16[512,512] fusion(%f1), calls=%moving, backend_config={"estimated_cycles":"200"}
  %f3 = bf16[512,512] fusion(%f2), calls=%doubling, backend_config={"estimated_cycles":"30"}
  ROOT %tuple = (s32[], bf16[512,512]{1,0}) tuple(%i, %f3)
}

ENTRY %main (a: bf16[512,512]) -> f32[] {
  %a = bf16[512,512]{1,0} parameter(0)
  %loop = (s32[], bf16[512,512]{1,0}) while(%a), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %moved = bf16[512,512] copy(%loop), backend_config={"estimated_cycles":"7"}
  ROOT %out = f32[] reduce(%moved), to_apply=%sum, backend_config={"estimated_cycles":"5"}
}
"""


def test_cycles_by_kind_in_a_loop():
    """A fusion with a matmul inside is one of matmuls, however deep it lies."""
    program = read_program(TEXT, {"fsdp": 1})
    assert program.work == {"matmuls": 3 * 1000, "copies": 3 * 200 + 7, "elementwise": 3 * 30 + 5}
    assert program.cycles == sum(program.work.values())


def test_a_report_says_what_cycles_are_spent_on():
    machine = parse_topology("v6e:2x2")
    program = {"cycles": 100, "work": dict(matmuls=80, copies=15, elementwise=5)}
    program["matmul_flops"] = 0.75 * 80 / machine.chip.clock * machine.peak
    (line,) = _format_work(program, machine)
    assert line.startswith("cycles by kind: matmuls ") and "at 75.0% of the peak" in line
    assert "copies" in line and "elementwise" in line
    assert _format_work(program | {"cycles": 0}, machine) == []
