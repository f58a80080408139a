"""`gpt-jax inspect --checkpoint` shows weights, differences and damage."""

import json

import numpy as np
import pytest
from drawn_models import LLAMA, make_origin, read_all

from gpt_jax.commands.main import run_to_end
from gpt_jax.errors import NoCheckpoint
from gpt_jax.run.convert import write_native


@pytest.fixture
def two(tmp_path):
    """Two checkpoints that differ in one parameter."""
    first = make_origin()

    def read(path, index):
        values = first.read(path, index)
        return 2 * values if path == "final_norm/scale" else values

    write_native(first, tmp_path / "a", print)
    write_native(first._replace(read=read), tmp_path / "b", print)
    return tmp_path / "a", tmp_path / "b"


def inspect(capsys, *given) -> str:
    capsys.readouterr()
    code, reason = run_to_end(["inspect", *map(str, given)])
    assert code == 0, reason
    return capsys.readouterr().out


def test_each_parameter_has_its_figures(two, capsys):
    found = json.loads(inspect(capsys, f"--checkpoint={two[0]}", "--json"))
    values = read_all(make_origin())
    assert [row["path"] for row in found["tensors"]] == sorted(values)
    for row in found["tensors"]:
        mine = values[row["path"]]
        assert row["shape"] == list(mine.shape) and row["size"] == mine.nbytes
        assert row["norm"] == pytest.approx(np.linalg.norm(mine.astype(np.float64)), rel=1e-9)
        assert row["largest"] == np.abs(mine).max()
    assert found["parameters"] == sum(value.size for value in values.values())
    assert found["step"] == 0 and found["tokenizer"] == "bytes"

    text = inspect(capsys, f"--checkpoint={two[0]}")
    assert "blocks/0/attention/q/kernel" in text and "3x16x16" in text


def test_a_difference_names_what_differs(two, capsys):
    text = inspect(capsys, f"--checkpoint={two[0]}", f"--diff={two[1]}")
    lines = text.splitlines()
    assert lines[-1] == f"1 of {len(read_all(make_origin()))} parameters differ"
    assert lines[1].split()[0] == "final_norm/scale" and lines[1].split()[-1] == "1"
    assert inspect(capsys, f"--checkpoint={two[0]}", f"--diff={two[0]}").startswith("0 of ")


def test_models_of_two_shapes_are_not_compared(two, tmp_path):
    write_native(make_origin(LLAMA | dict(embed=32)), tmp_path / "c", print)
    given = ["inspect", f"--checkpoint={two[0]}", f"--diff={tmp_path / 'c'}"]
    code, reason = run_to_end(given)
    assert code == 2 and "do not have the same parameters" in reason


def test_verify_finds_one_flipped_bit(two, capsys):
    assert inspect(capsys, f"--checkpoint={two[0]}", "--verify") == "step 0: whole\n"
    file = max((two[0] / "checkpoints/0/params/d").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)

    code, reason = run_to_end(["inspect", f"--checkpoint={two[0]}", "--verify"])
    assert code == NoCheckpoint.code and "damaged: step 0" in reason
    assert "sha256" in capsys.readouterr().out


def test_a_step_that_is_being_saved_is_no_damage(two, capsys):
    (two[0] / "checkpoints/6").mkdir()
    (two[0] / "checkpoints/6.saving").touch()
    assert inspect(capsys, f"--checkpoint={two[0]}", "--verify") == "step 0: whole\n"
    one = two[0] / "checkpoints/0"
    assert inspect(capsys, f"--checkpoint={one}", "--verify") == "step 0: whole\n"


def test_no_number_is_a_difference(tmp_path, capsys):
    first = make_origin()

    def read(path, index):
        values = first.read(path, index)
        return np.full_like(values, np.nan) if path == "final_norm/scale" else values

    write_native(first, tmp_path / "a", print)
    write_native(first._replace(read=read), tmp_path / "b", print, print)
    text = inspect(capsys, f"--checkpoint={tmp_path / 'a'}", f"--diff={tmp_path / 'b'}")
    assert text.splitlines()[-1].startswith("1 of ")
    found = json.loads(inspect(capsys, f"--checkpoint={tmp_path / 'b'}", "--json"))
    norms = {row["path"]: row["norm"] for row in found["tensors"]}
    assert norms["final_norm/scale"] is None and norms["embed/table"] > 0


BAD = {
    "verify and diff": (["--checkpoint=a", "--verify", "--diff=b"], "goes with --checkpoint alone"),
    "diff of a workdir": (["--workdir=a", "--diff=b"], "--diff: goes with --checkpoint"),
    "a step of nothing": (["--checkpoint=a", "--diff_step=3"], "--diff_step=3: needs --diff"),
    "nothing": ([], "--workdir=DIR or --checkpoint=DIR: say what to inspect"),
    "both": (["--workdir=a", "--checkpoint=b"], "say what to inspect"),
    "absent": (["--checkpoint=absent"], "does not exist"),
    "negative": (["--checkpoint=absent", "--step=-1"], "--step=-1: expected 0 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_inspected_is_refused(name):
    given, text = BAD[name]
    code, reason = run_to_end(["inspect", *given])
    assert code == 2 and text in reason
