"""Compiler options: a config changes them, they reach every compilation, and faults are named.

The environment that JAX gets is tested here too.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import runs
from plans import job_of

from gpt_jax import config as configs
from gpt_jax.commands import environment
from gpt_jax.errors import UsageError
from gpt_jax.hardware import CHIPS, peak_flops, xla_options
from gpt_jax.plan import compiled
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding import mesh

ROOT = Path(__file__).parents[2]
# Behind the others, because some benchmarks have the names of files in tests/support.
sys.path.append(str(ROOT / "benchmarks"))
import plan as plan_benchmark  # noqa: E402
import tpu_options  # noqa: E402
import tpu_step_tables  # noqa: E402
import tpu_steps  # noqa: E402


def test_options_are_parsed():
    options = xla_options.parse_options(["a=true", "b=-3", "c=x=y", "d="])
    assert options == {"a": True, "b": -3, "c": "x=y", "d": None}
    words = r"config\.compute\.compiler_options = 'a': expected NAME=VALUE"
    with pytest.raises(UsageError, match=words):
        xla_options.parse_options(["a"])


def test_a_config_adds_replaces_and_leaves_out(monkeypatch):
    monkeypatch.setattr(xla_options, "DEFAULTS", {"gpu": {"a": True, "b": 1}})
    monkeypatch.setattr(xla_options, "GENERATIONS", {"new": {"b": 4, "d": 5}})
    choose = xla_options.choose_xla_options
    assert choose("gpu", "", ("b=2", "a=", "c=3")) == {"b": 2, "c": 3}
    assert choose("gpu", "new") == {"a": True, "b": 4, "d": 5}
    assert choose("gpu", "new", ("b=2", "d=")) == {"a": True, "b": 2}
    assert choose("cpu") == {}

    values = configs.to_dict(configs.Config())
    configs.override(values, "compute.compiler_options", "a=1,b=x")
    assert configs.from_dict(values).compute.compiler_options == ("a=1", "b=x")
    # `gpt-jax plan` writes options with commas in this way.
    configs.override(values, "compute.compiler_options", str(("a=x,y", "b=1")))
    assert configs.from_dict(values).compute.compiler_options == ("a=x,y", "b=1")


@pytest.mark.parametrize("of_config", [True, False])
def test_they_are_part_of_the_train_step(monkeypatch, of_config):
    """With an option that no compiler knows, in the config or in the table, nothing compiles."""
    texts = ("xla_no_such_option=1",) if of_config else ()
    defaults = {} if of_config else {"cpu": {"xla_no_such_option": 1}}
    monkeypatch.setattr(xla_options, "DEFAULTS", defaults)

    config = job_of("tiny").config
    compute = replace(config.compute, compiler_options=texts, kernel="reference")
    config = replace(config, compute=compute)
    lowered = compiled.lower_step(config, mesh.make_mesh({}, jax.devices()[:1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.compile()


@pytest.mark.parametrize("text", ["xla_no_such_option=1", "xla_backend_optimization_level=high"])
def test_a_run_refuses_what_its_compiler_does_not_know(tmp_path, text):
    name = text.partition("=")[0]
    with pytest.raises(UsageError, match=rf"config\.compute\.compiler_options: .*{name}"):
        runs.build(runs.load(tmp_path, f"--config.compute.compiler_options={text}"))


@pytest.mark.parametrize("kind", sorted(xla_options.GENERATIONS))
def test_what_a_generations_options_cost_is_said_unless_one_is_left_out(kind):
    own = xla_options.GENERATIONS[kind]
    words = f"compiling takes about {xla_options.SLOWDOWNS[kind]:g} times as long with "
    chosen = xla_options.choose_xla_options("tpu", kind)
    assert words + ", ".join(own) in xla_options.describe_xla_options("tpu", kind, chosen)

    without = xla_options.choose_xla_options("tpu", kind, [f"{name}=" for name in own])
    line = xla_options.describe_xla_options("tpu", kind, without)
    assert "times as long" not in line and next(iter(own)) not in line


def test_the_generations_are_those_of_the_chips():
    """A kind that no device has would never be looked up."""
    kinds = [*xla_options.GENERATIONS]
    assert sorted(kinds) == sorted(xla_options.SLOWDOWNS)
    assert all(peak_flops(kind) for kind in kinds)


@pytest.mark.parametrize("name", [*tpu_options.CHOSEN])
def test_a_limit_is_shipped_where_the_cycles_gain_by_it(name):
    """The sums are milliseconds of the three matmuls of benchmarks/tpu_options.json."""
    limit = xla_options.GENERATIONS[CHIPS[name].kind][tpu_options.LIMIT]
    assert str(limit) == tpu_options.CHOSEN[name]

    rows = tpu_options.read_rows()
    before, after = (
        sum(one["milliseconds"] for one in rows[f"matmuls {name} {text}"]["programs"].values())
        for text in ("default", limit)
    )
    assert after < 0.97 * before


def test_the_pages_have_the_tables_that_the_benchmarks_make():
    pages = [(ROOT / "docs" / page).read_text() for page in ("plan.md", "plan_table.md")]
    lines = [
        *tpu_options.format_tables(tpu_options.read_rows()),
        *plan_benchmark.format_published(plan_benchmark.read_rows()),
        *tpu_step_tables.format_parts(tpu_steps.read_rows()),
        *tpu_step_tables.format_steps(tpu_steps.read_rows()),
    ]
    assert len(lines) > 30
    assert [line for line in lines if line not in "".join(pages)] == []


def test_a_run_says_what_it_compiles_with(tmp_path):
    override = "--config.compute.compiler_options=xla_backend_optimization_level=0"
    parts = runs.build(runs.load(tmp_path, override))
    assert "compiler options (cpu): xla_backend_optimization_level=0" in parts.notes
    options = run_parts.compiler_options(parts.config, parts.mesh)
    assert options == {"xla_backend_optimization_level": 0}

    plain = runs.build(runs.load(tmp_path))
    assert not any("compiler options" in line for line in plain.notes)


@pytest.mark.parametrize(
    "given",
    [{}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}],
)
def test_a_gpus_memory_is_asked_for_unless_the_environment_says_otherwise(given):
    variables = dict(given)
    environment.prepare(variables)
    assert variables == (given or {"XLA_CLIENT_MEM_FRACTION": "0.9"})


@pytest.mark.skipif(
    environment.SKIP not in os.environ or Path("/dev/nvidiactl").exists(),
    reason="an accelerator is here",
)
def test_libtpu_is_quiet_where_there_is_no_tpu():
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    code = (
        "from gpt_jax.commands import environment; environment.prepare(); "
        "import jax; print(jax.devices())"
    )
    known = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)

    assert done.stdout.startswith("[CpuDevice")
    assert done.stderr == ""
