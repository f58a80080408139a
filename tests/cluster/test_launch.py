"""The launchers, with a stand-in for what they install: arguments pass through, and a machine
without Python is told so."""

import os
import shutil
import subprocess

import pytest
import runs


@pytest.fixture
def house(tmp_path):
    """A copy of what the launchers read, and a .venv that looks installed and whose programs
    print their arguments."""
    shutil.copytree(runs.ROOT / "launch", tmp_path / "launch")
    shutil.copy(runs.ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("gpt-jax", "python"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s|" "$(basename "$0")" "$@"\n')
        (programs / name).chmod(0o755)
    pins = (tmp_path / "pyproject.toml").read_bytes() + (
        tmp_path / "launch/constraints.txt"
    ).read_bytes()
    wanted = subprocess.run(["cksum"], input=pins, capture_output=True).stdout.decode().strip()
    for stamp in ("installed", "installed-test"):
        (tmp_path / ".venv" / stamp).write_text(wanted)
    return tmp_path


def launch(house, script, *given, **env):
    return subprocess.run(
        [house / "launch" / script, *given],
        capture_output=True,
        text=True,
        env=os.environ | env,
        cwd=house,
    )


def test_arguments_pass_through(house):
    ended = launch(house, "local.sh", "train", "--config.data.path=a b.txt", "--prompt=")
    assert (ended.returncode, ended.stdout) == (
        0,
        "gpt-jax|train|--config.data.path=a b.txt|--prompt=|",
    )
    for own in (["--processes=2"], ["--devices_per_process", "4"], ["--restarts=3"]):
        for given in ([*own, "train", "--x=a b"], ["train", "--x=a b", *own]):
            ended = launch(house, "local.sh", *given)
            assert (ended.returncode, ended.stdout) == (
                0,
                f"gpt-jax|launch|local|{'|'.join(given)}|",
            )
    ended = launch(house, "local.sh", "launch", "slurm", "--restarts=3", "train")
    assert ended.stdout == "gpt-jax|launch|slurm|--restarts=3|train|"
    ended = launch(house, "test.sh", "-k", "x y")
    assert (ended.returncode, ended.stdout) == (0, "python|-m|pytest|-n|2|-k|x y|")


@pytest.mark.parametrize("python", ["no_such_python", "old"])
def test_a_python_that_cannot_serve_is_named(house, python):
    old = house / "old"
    old.write_text(
        "#!/bin/sh\nexit 1\n"
    )  # what a Python before 3.11 answers to the question for its version
    old.chmod(0o755)
    python = str(old) if python == "old" else python
    ended = launch(house, "local.sh", "train", PYTHON=python)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr == (
        f"gpt-jax needs Python 3.11 or newer as '{python}'; install it or set "
        "PYTHON=/path/to/python3\n"
    )


def test_changed_pins_install_again(house):
    """Up to the step that would need a network: `python -m venv`, here one that fails."""
    (house / "launch/constraints.txt").write_text("jax==0\n")
    fake = house / "fake"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexit 3\n')
    fake.chmod(0o755)
    ended = launch(house, "local.sh", "train", PYTHON=str(fake))
    assert (
        ended.returncode == 2
        and "installing into" in ended.stderr
        and "python3-venv" in ended.stderr
    )
