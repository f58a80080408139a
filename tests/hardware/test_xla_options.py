"""Compiler options: parsed, changed by the config, part of every compilation, refused in one
line; and what JAX is told by the environment."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import runs
from plans import job_of

from gpt_jax import config as configs
from gpt_jax.commands import environment
from gpt_jax.errors import UsageError
from gpt_jax.hardware import xla_options
from gpt_jax.plan import compiled
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding import mesh


def test_options():
    assert xla_options.parse(["a=true", "b=-3", "c=x=y", "d="]) == {
        "a": True,
        "b": -3,
        "c": "x=y",
        "d": None,
    }
    with pytest.raises(
        UsageError, match="config.train.compiler_options = 'a': expected NAME=VALUE"
    ):
        xla_options.parse(["a"])


def test_a_config_adds_replaces_and_leaves_out(monkeypatch):
    monkeypatch.setattr(xla_options, "DEFAULTS", {"gpu": {"a": True, "b": 1}})
    assert xla_options.choose_xla_options("gpu", ("b=2", "a=", "c=3")) == {"b": 2, "c": 3}
    assert xla_options.choose_xla_options("cpu") == {}
    values = configs.to_dict(configs.Config())
    configs.override(values, "train.compiler_options", "a=1,b=x")
    assert configs.from_dict(values).train.compiler_options == ("a=1", "b=x")
    configs.override(
        values, "train.compiler_options", str(("a=x,y", "b=1"))
    )  # as `gpt-jax plan` writes it
    assert configs.from_dict(values).train.compiler_options == ("a=x,y", "b=1")


@pytest.mark.parametrize("of_config", [True, False])
def test_they_are_part_of_the_train_step(monkeypatch, of_config):
    """An option that no compiler knows, in the config or in the table, and the step does not
    compile."""
    config = job_of("tiny").config
    texts = ("xla_no_such_option=1",) if of_config else ()
    monkeypatch.setattr(
        xla_options, "DEFAULTS", {} if of_config else {"cpu": {"xla_no_such_option": 1}}
    )
    config = configs.from_dict(
        configs.to_dict(config)
        | {
            "train": configs.to_dict(config)["train"] | {"compiler_options": texts},
            "model": configs.to_dict(config)["model"] | {"kernel": "reference"},
        }
    )
    lowered = compiled.lower(config, mesh.make_mesh({}, jax.devices()[:1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        lowered.compile()


def test_a_run_refuses_what_its_compiler_does_not_know_and_says_what_it_has(tmp_path):
    for text in ("xla_no_such_option=1", "xla_backend_optimization_level=high"):
        with pytest.raises(
            UsageError, match=f"config.train.compiler_options: .*{text.partition('=')[0]}"
        ):
            runs.build(runs.load(tmp_path, f"--config.train.compiler_options={text}"))
    parts = runs.build(
        runs.load(tmp_path, "--config.train.compiler_options=xla_backend_optimization_level=0")
    )
    assert "compiler options (cpu): xla_backend_optimization_level=0" in parts.notes
    assert not any("compiler options" in line for line in runs.build(runs.load(tmp_path)).notes)
    assert run_parts.compiler_options(parts.config, parts.mesh) == {
        "xla_backend_optimization_level": 0
    }


def test_a_gpus_memory_is_asked_for_unless_the_environment_says_otherwise():
    for given in (
        {},
        {"XLA_CLIENT_MEM_FRACTION": "0.5"},
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
    ):
        found = dict(given)
        environment.prepare(found)
        assert found == (given or {"XLA_CLIENT_MEM_FRACTION": "0.9"})


@pytest.mark.skipif(
    environment.SKIP not in os.environ or Path("/dev/nvidiactl").exists(),
    reason="an accelerator is here",
)
def test_libtpu_is_quiet_where_there_is_no_tpu():
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    code = "from gpt_jax.commands import environment; environment.prepare(); import jax; print(jax.devices())"
    known = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=known, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("[CpuDevice") and done.stderr == ""
