"""The programs that prove a refactoring see what they must, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent / "support"
CODE = '''"""A module."""

def work(a):
    """Works."""
    raise ValueError(f"bad {a}")  # why
'''


def run(program: str, *arguments, folder: Path) -> tuple[int, str]:
    """(exit code, standard output) of a program in tests/support."""
    command = [sys.executable, str(SUPPORT / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of a folder with one file."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/work.py").write_text(CODE)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize(
    "old, new, flags, code",
    [
        ('"""Works."""', '"""Does the work."""', [], 0),
        ('"""A module."""\n', "", [], 0),
        ("  # why", "\n    # because", [], 0),
        ("bad {a}", "wrong {a}", [], 1),
        ("bad {a}", "wrong {a}", ["--strings"], 0),
        ("bad {a}", "wrong {b}", ["--strings"], 1),
        ("ValueError", "TypeError", [], 1),
        ("work(a)", "work(a, b=1)", ["--strings"], 1),
    ],
)
def test_same_code(repository, old, new, flags, code):
    (repository / "deep/work.py").write_text(CODE.replace(old, new))
    verdict = "differs: deep/work.py\n0 of 1" if code else "1 of 1"
    expected = code, f"{verdict} changed files do what they did\n"
    assert run("same_code.py", "HEAD", *flags, folder=repository) == expected
    assert run("same_code.py", "HEAD", "work.py", *flags, folder=repository / "deep") == expected


def test_removed_file_differs(repository):
    (repository / "deep/work.py").unlink()
    assert run("same_code.py", "HEAD", folder=repository)[0] == 1


def write_metrics(folder: Path, *rows: dict) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_same_losses(tmp_path):
    first = {"step": 1, "train/loss": 0.1 + 0.2, "time/step": 0.5, "sample/0": "a"}
    rows = [first, {"step": 2, "train/loss": float("nan")}]
    before = write_metrics(tmp_path / "before", *rows)
    other_start = {"step": 0, "session/host": "b", "time/wall_seconds": 3.0}
    slower = write_metrics(tmp_path / "slower", other_start, {**first, "time/step": 0.9}, rows[1])
    moved = write_metrics(tmp_path / "moved", {**first, "train/loss": 0.3}, rows[1])
    shorter = write_metrics(tmp_path / "shorter", first)
    empty = write_metrics(tmp_path / "empty")

    def compare(after):
        return run("same_losses.py", before, after, folder=tmp_path)

    assert compare(slower) == (0, "3 values equal to the bit\n")
    line = "train/loss at step 1: 0.30000000000000004 before, 0.3 after\n"
    assert compare(moved) == (1, line)
    assert compare(shorter) == (1, "train/loss at step 2: nan before, None after\n")
    assert run("same_losses.py", empty, empty, folder=tmp_path)[0] == 1
