"""A branch goes on from an older checkpoint, and the run stays as it was."""

import errno
import os
import shutil

import runs

from gpt_jax.run import branch

FLAGS = ("--config.optim.decay_steps=6", "--config.checkpoint.keep_last=9")


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_branch_leaves_the_run_alone(tmp_path, capsys):
    old = tmp_path / "old"
    new = tmp_path / "branch"
    every = "--config.checkpoint.every_steps=2"
    runs.call(*runs.arguments(tmp_path, old, *FLAGS, every, "--config.train.steps=6"))
    before = read_files(old)
    capsys.readouterr()

    again = runs.arguments(tmp_path, old, *FLAGS, every, "--config.train.steps=6")
    runs.call(*again, "--from_step=2", f"--branch={new}")
    assert f"{new} goes on from step 2 of {old}" in capsys.readouterr().out
    assert read_files(old) == before
    # Nothing was changed, so the branch repeats the run, and its curve is whole.
    assert runs.curve(new) == runs.curve(old)

    other = (*again, "--from_step=4", f"--branch={tmp_path / 'other'}")
    runs.call(*other, "--config.optim.weight_decay=0.5", "--config.optim.learning_rate=1e-3")
    said = capsys.readouterr().out
    assert "weight_decay changed since the checkpoint: 0.1 -> 0.5: weights shrink" in said
    assert "the learning rate of step 5 is" in said
    curve = runs.curve(tmp_path / "other")
    assert {step: curve[step] for step in (1, 2, 3, 4)} == {
        step: runs.curve(old)[step] for step in (1, 2, 3, 4)
    }
    assert curve[6] != runs.curve(old)[6]
    # A second start resumes the branch, wherever it was taken from.
    runs.call(*other, "--config.optim.weight_decay=0.5", "--config.optim.learning_rate=1e-3")
    assert "is a branch already, and goes on" in capsys.readouterr().out


def test_what_is_no_branch(tmp_path):
    old = tmp_path / "old"
    command = runs.arguments(tmp_path, old, "--config.train.steps=2")
    runs.call(*command)
    runs.call(*command, f"--branch={tmp_path / 'taken'}")
    shutil.copytree(tmp_path / "taken", tmp_path / "foreign")
    (tmp_path / "foreign/branch.json").unlink()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_text("{}")  # a run that has saved nothing yet
    for words, flags in (
        ("holds a run, and no branch.json", [f"--branch={tmp_path / 'foreign'}"]),
        ("holds a run, and no branch.json", [f"--branch={tmp_path / 'begun'}"]),
        (
            f"was taken from step 2 of {old}; give another",
            ["--from_step=1", f"--branch={tmp_path / 'taken'}"],
        ),
        ("is the run itself", [f"--branch={old}"]),
        ("no step 7", ["--from_step=7", f"--branch={tmp_path / 'b'}"]),
        ("--from_step=2: expected", ["--from_step=2"]),
        ("--from_step=0: expected", ["--from_step=0", f"--branch={tmp_path / 'b'}"]),
    ):
        code, message = runs.refusal(*command, *flags)
        assert code == 2 and words in message


def test_a_copy_that_fails_leaves_no_branch(tmp_path, monkeypatch):
    old = tmp_path / "old"
    command = runs.arguments(tmp_path, old, "--config.train.steps=2")
    runs.call(*command)

    def fail(source, destination):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(branch, "link_or_copy", fail)
    flags = [f"--branch={tmp_path / 'branch'}"]
    code, message = runs.refusal(*command, *flags)
    assert code == 2 and "cannot be copied ([Errno 28] No space left on device); free" in message
    assert len(message) < 500

    monkeypatch.undo()
    runs.call(*command, *flags)
    assert runs.curve(tmp_path / "branch") == runs.curve(old)
