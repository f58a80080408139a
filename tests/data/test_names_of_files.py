"""Files whose names are no text: bytes that are no UTF-8, ends of lines, control characters."""

import json
import os
import pickle

import pytest
import runs
from prepared import documents, prepare, refused

from gpt_jax.commands.output import write_json
from gpt_jax.errors import UsageError, escape, exit_of, plain

LATIN = os.fsdecode(b"caf\xe9.txt")
ODD = "two\nlines\x1b[2J.txt"
TEXT = "alpha beta gamma delta epsilon zeta eta theta iota kappa. " * 60


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (LATIN, ODD):
        (folder / name).write_text(TEXT)
    return folder


def test_messages_are_one_line_each():
    assert escape("a\nb\x1b[2J\udce9 我") == r"a\nb\x1b[2J\udce9 我"
    assert plain("a\n  b\x1b") == r"a b\x1b"
    error = UsageError("a\nb", "c")
    assert str(error) == "a\\nb\nc" and error.args == (r"a\nb", "c")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == str(exit_of(2, str(error)))

    values = {LATIN: ["我", 1.5, "\udce9\n"]}
    assert json.loads(write_json(values)) == values
    assert write_json(values).encode().decode() == r'{"caf\udce9.txt": ["我", 1.5, "\udce9\n"]}'


def test_a_run_on_a_file_whose_name_is_no_text(folder, tmp_path, capsys):
    """It trains, is looked into, and is measured, as on any other file."""
    workdir = tmp_path / "run"
    given = runs.arguments(
        tmp_path,
        workdir,
        f"--config.data.path={folder}",
        "--config.data.split=tail",
        "--config.train.steps=2",
        "--config.optim.warmup_steps=0",
        "--config.eval.batches=1",
    )
    runs.call(*given)
    runs.call("inspect", f"--workdir={workdir}", "--batch=1", "--rows=2")
    assert r"caf\udce9.txt" in capsys.readouterr().out
    runs.call("inspect", f"--workdir={workdir}", "--batch=1", "--rows=1", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["documents"][0]["name"] in (f"data/{LATIN}", f"data/{ODD}")

    texts = (str(folder / LATIN), str(folder / ODD))
    runs.call("evaluate", f"--checkpoint={workdir}", "--batches=1", "--text", *texts)
    out = capsys.readouterr().out
    assert r"caf\udce9.txt" in out and r"two\nlines\x1b[2J.txt" in out


def test_a_prepare_of_files_whose_names_are_no_text(folder, tmp_path, capsys):
    out = prepare(tmp_path / "out", f"--input={folder}")
    assert documents(out)["text"]["train"] == [TEXT, TEXT]
    runs.call("prepare", f"--inspect={out}")
    said = capsys.readouterr()
    assert r"data/caf\udce9.txt" in said.out and "\x1b" not in said.out + said.err


def test_refusals_name_such_files_in_one_line(folder, tmp_path):
    for name, shown in ((LATIN, r"caf\udce9.txt"), (ODD, r"two\nlines\x1b[2J.txt")):
        (folder / name).write_bytes(b"\xff")
        refused(2, (shown, "not UTF-8"), f"--input={folder / name}", f"--output={tmp_path / 'o'}")
        missing = f"--input={folder / name}x"
        words = (f"{shown}x", "no file matches" if "[" in name else "no such file")
        refused(2, words, missing, f"--output={tmp_path / 'o'}")
    prepare(
        tmp_path / "skipped",
        f"--input={folder}",
        str(runs.write_text(tmp_path / "fine.txt")),
        "--on_error=skip",
    )
