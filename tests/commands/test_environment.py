"""A mistake in the environment is one line that names the variable, and exit code 2."""

import os
import shutil
import subprocess
import sys

import jax
import jaxlib.version
import pytest
import runs

from gpt_jax.commands import environment
from gpt_jax.hardware import add_xla_flags


def run(*given: str, **variables: str) -> tuple[int, list[str]]:
    """(exit code, the program's own lines) of a command in an interpreter of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "gpt_jax", *given],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)} | variables,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, [
        line for line in ended.stderr.splitlines() if line.startswith("gpt-jax: ")
    ]


@pytest.mark.parametrize(
    "name, value",
    [
        ("JAX_PLATFORMS", "no_such"),
        ("JAX_NUM_CPU_DEVICES", "many"),
        ("JAX_ENABLE_X64", "maybe"),
        ("XLA_FLAGS", "--xla_no_such_flag=1"),
        ("XLA_FLAGS", "/no/such/file"),
    ],
)
def test_a_command_names_the_variable(tmp_path, name, value):
    code, lines = run("generate", f"--checkpoint={tmp_path}", **{name: value})
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith(f"gpt-jax: {name}={value}")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_libraries_say_nothing_of_devices_that_are_not_here(tmp_path, command):
    """libtpu complains in four lines where it is installed and finds no TPU."""
    unset = {"JAX_PLATFORMS", environment.SKIP, *environment.NO_TPU}
    ended = subprocess.run(
        [sys.executable, "-m", "gpt_jax", command, f"--checkpoint={tmp_path / 'none'}"],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        env={name: value for name, value in os.environ.items() if name not in unset}
        | {"PYTHONPATH": str(runs.ROOT)},
    )
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and "does not exist" in line


@pytest.mark.parametrize("there", [False, True])
def test_an_environment_that_is_a_link_is_named(tmp_path, there):
    """venv refuses a link, whether it leads to a folder or to nothing, and says something else."""
    shutil.copytree(runs.ROOT / "launch", tmp_path / "launch")
    shutil.copy(runs.ROOT / "pyproject.toml", tmp_path)
    if there:
        (tmp_path / "other").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "other")
    script = 'source "$1/launch/environment.sh"; make_environment "$1" ""'
    ended = subprocess.run(
        ["bash", "-c", script, "bash", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    line = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "python3-venv" not in ended.stderr
    assert f"{tmp_path}/.venv is a link to {tmp_path}/other" in line and "remove the link" in line
    assert not any(tmp_path.glob("other/*"))


def test_the_flags_of_the_package_itself_need_no_look(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a copy"))
    environ = {}
    add_xla_flags(environ, jaxlib.version.__version__)
    environment.check_xla_flags(environ)


def error_of(action) -> Exception:
    with pytest.raises(Exception) as raised:
        action()
    return raised.value


@pytest.mark.parametrize("platform", ["cuda", "gpu", "no_such"])
def test_a_platform_that_is_not_here(platform):
    error = error_of(lambda: jax.devices(platform))
    line = environment.find_fault(error, {"JAX_PLATFORMS": platform})
    assert line.startswith(f"JAX_PLATFORMS={platform}: there is no such device that JAX can open")
    assert line.endswith("unset it to take what is here, or set JAX_PLATFORMS=cpu")
    line = environment.find_fault(error, {})
    assert line.startswith("JAX cannot open the devices of this machine (Unknown backend")


def test_what_is_no_fault_of_the_environment_is_a_bug():
    def divide():
        raise RuntimeError("Unknown backend")

    assert environment.find_fault(error_of(divide), {"JAX_PLATFORMS": "cuda"}) is None
    assert (
        environment.find_fault(error_of(lambda: jax.numpy.ones(2) @ jax.numpy.ones(3)), {}) is None
    )


@pytest.mark.parametrize(
    "text, named",
    [
        ("Invalid value 'x' for JAX flag jax_num_cpu_devices", "JAX_NUM_CPU_DEVICES=x: "),
        ("invalid literal for int() with base 10: 'y'", "JAX_OTHER=y: "),
        ("something else", "JAX_NUM_CPU_DEVICES=x, JAX_OTHER=y: "),
    ],
)
def test_the_variable_is_found_by_name_or_value(text, named):
    environ = {"JAX_NUM_CPU_DEVICES": "x", "JAX_OTHER": "y", "HOME": "x"}
    assert environment.describe_variable(ValueError(text), environ).startswith(named)
