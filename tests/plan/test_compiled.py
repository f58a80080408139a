"""What a plan takes from the compiler's account of a program, and what it says of its options."""

from types import SimpleNamespace

import pytest
from plans import read_plan, run_plan

from gpt_jax.plan.compiled import _measure
from gpt_jax.plan.program.program import read_program


def make_account(**more) -> SimpleNamespace:
    sizes = dict(argument_size_in_bytes=100, output_size_in_bytes=60, alias_size_in_bytes=50)
    return SimpleNamespace(**sizes, temp_size_in_bytes=40, **more)


@pytest.mark.parametrize(
    "peak, argument, temporary, wanted",
    [(120, 0, 0, 150), (170, 0, 0, 170), (170, 0, 30, 150), (170, 30, 0, 150)],
)
def test_memory_of_the_host_is_not_the_devices(peak, argument, temporary, wanted):
    """150 is what arguments, other outputs and temporaries take together."""
    account = make_account(
        peak_memory_in_bytes=peak,
        host_argument_size_in_bytes=argument,
        host_temp_size_in_bytes=temporary,
    )
    program = read_program("HloModule empty\n\nENTRY main {\n  ROOT x = f32[] constant(0)\n}\n", {})
    assert _measure(account, 1.0, program).peak == wanted


def test_a_plan_names_the_compilers_options_and_what_they_cost(capsys):
    limit = "xla_tpu_scoped_vmem_limit_kib"
    run_plan("tiny", "v6e:2x2", "--config.mesh.data=4")
    line = next(line for line in capsys.readouterr().out.splitlines() if limit in line)
    assert line.startswith("compiler options (tpu): ") and "times as long" in line

    run_plan("tiny", "v6e:2x2", "--config.mesh.data=4", "--json")
    options = read_plan(capsys)["compiler_options"]
    assert all(f"{name}={value}" in line for name, value in options.items())

    run_plan(
        "tiny", "v6e:2x2", "--config.mesh.data=4", f"--config.compute.compiler_options={limit}="
    )
    assert "times as long" not in capsys.readouterr().out
