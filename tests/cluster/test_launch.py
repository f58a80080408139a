"""The launchers, with a stand-in for what they install.

Arguments pass through, and a machine without Python is told so.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import runs


def constraints(version) -> str:
    """The file of exact versions for a Python of `version`."""
    return f"launch/constraints-{'py311' if version < (3, 12) else 'py312'}.txt"


@pytest.fixture
def house(tmp_path):
    """A copy of what the launchers read, with a .venv that looks installed.

    Its programs print their arguments.
    """
    shutil.copytree(runs.ROOT / "launch", tmp_path / "launch")
    shutil.copy(runs.ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)

    for name in ("gpt-jax", "python"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s|" "$(basename "$0")" "$@"\n')
        (programs / name).chmod(0o755)
    pins = b"".join(
        (tmp_path / name).read_bytes() for name in ("pyproject.toml", constraints(sys.version_info))
    )
    wanted = subprocess.run(["cksum"], input=pins, capture_output=True).stdout.decode().strip()
    for stamp in ("installed", "installed-test"):
        (tmp_path / ".venv" / stamp).write_text(wanted)
    return tmp_path


def launch(house, script, *given, **env):
    return subprocess.run(
        [house / "launch" / script, *given],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | env,
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
    assert (ended.returncode, ended.stdout) == (0, "python|-m|pytest|-n|2|--dist|worksteal|-k|x y|")


@pytest.mark.parametrize("python", ["no_such_python", "old"])
def test_a_python_that_cannot_serve_is_named(house, python):
    old = house / "old"
    # A Python before 3.11 answers so when its version is asked for.
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    python = str(old) if python == "old" else python
    ended = launch(house, "local.sh", "train", PYTHON=python)

    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr == (
        f"gpt-jax needs Python 3.11 or newer as '{python}'; install it or set "
        "PYTHON=/path/to/python3\n"
    )


def test_changed_pins_install_again(house):
    """The install comes to the step that would need a network. Here `python -m venv` fails."""
    (house / "launch/constraints-py312.txt").write_text("jax==0\n")
    ended = launch(house, "local.sh", "train", PYTHON=make_python(house, 3, 12))
    assert (
        ended.returncode == 2
        and "installing into" in ended.stderr
        and "python3-venv" in ended.stderr
    )


def make_python(house, *version: int) -> str:
    """A program that tells its version as Python does, and makes no environment."""
    fake = house / f"python{version[0]}.{version[1]}"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 3\n{sys.executable} -c \'{pretend}\' "$2"\n')
    fake.chmod(0o755)
    return str(fake)


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_each_python_has_its_exact_versions(house, version):
    """A change of its own file makes the environment new. A change of another file does not."""
    used = house / constraints(version)
    python = make_python(house, *version)
    pins = (house / "pyproject.toml").read_bytes() + used.read_bytes()
    stamp = subprocess.run(["cksum"], input=pins, capture_output=True).stdout.decode().strip()
    (house / ".venv/installed").write_text(stamp)
    assert launch(house, "local.sh", "train", PYTHON=python).returncode == 0

    for path in (house / "launch").glob("constraints-*.txt"):
        if path != used:
            path.unlink()
    assert launch(house, "local.sh", "train", PYTHON=python).returncode == 0
    used.write_text("jax==0\n")
    assert "installing into" in launch(house, "local.sh", "train", PYTHON=python).stderr


def test_exact_versions_name_the_same_packages_and_nothing_else():
    """A line is `name==version`, without address and path. The files differ in versions alone."""
    texts = [path.read_text() for path in sorted((runs.ROOT / "launch").glob("constraints-*.txt"))]
    names = [re.findall(r"^([\w-]+)==[\w.]+$", text, re.MULTILINE) for text in texts]
    assert len(texts) == 2 and names[0] == names[1]
    assert [len(text.splitlines()) for text in texts] == [len(found) for found in names]
    versions = [re.search(r"^jax==(\d+\.\d+)", text, re.MULTILINE).group(1) for text in texts]
    assert versions == ["0.10", "0.12"]
