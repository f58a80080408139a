"""Checkpoints of a run are exported while it trains, each whole or not at all."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from drawn_models import LLAMA, assert_same, read_all

import gpt_jax
from gpt_jax import config as configs
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.interop import export
from gpt_jax.run import exporter, run_training
from gpt_jax.run.convert import open_model

MODEL = LLAMA | dict(vocab=0)


def values(steps: int, every: int = 2, **checkpoint) -> dict:
    """A run that saves and exports at each second step."""
    own = {"every_steps": 2, "export": "hf", "export_every_steps": every, **checkpoint}
    return {
        "model": MODEL,
        "data": {"path": str(Path(__file__)), "tokenizer": "bytes"},
        "train": {"steps": steps, "seq_len": 16, "batch_size": 8},
        "eval": {"batch_size": 8, "samples": 0, "every_steps": 0},
        "checkpoint": own,
    }


def train(workdir: Path, *given, **checkpoint) -> list[str]:
    lines: list[str] = []
    parts = gpt_jax.build(values(*given, **checkpoint), say=lines.append)
    run_training(parts, workdir, say=lines.append)
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_each_multiple_is_exported_although_checkpoints_go(tmp_path):
    lines = train(tmp_path, 7, keep_last=9)
    assert names(tmp_path / "hf") == ["2", "4", "6", "7"]
    for step in (2, 4, 6, 7):
        ours = read_all(open_model(str(tmp_path), step, print))
        theirs = open_model(str(tmp_path / f"hf/{step}"), 0, print, "bytes")
        assert_same(read_all(theirs), ours)
        assert sum(f"step {step} as a directory" in line for line in lines) == 1

    train(tmp_path / "b", 7, 4, keep_last=1)
    assert names(tmp_path / "b/hf") == ["4", "7"]
    assert names(tmp_path / "b/checkpoints") == ["7"]


def test_a_checkpoint_stays_while_it_is_exported(tmp_path, monkeypatch):
    """The exports of steps 2 and 4 wait until step 6 is saved, with one checkpoint to keep."""
    is_saved = threading.Event()
    found = []
    write = exporter.export_step

    def wait(config, directory, step, *rest):
        if step == 2:
            assert is_saved.wait(60)
        found.append((step, (directory / str(step) / "manifest.json").exists()))
        write(config, directory, step, *rest)

    class Watched(exporter.Exporter):
        def take(self, step):
            super().take(step)
            if step == 6:
                is_saved.set()

    monkeypatch.setattr(exporter, "export_step", wait)
    monkeypatch.setattr(exporter, "Exporter", Watched)
    train(tmp_path, 8, keep_last=1)
    assert found[:4] == [(2, True), (4, True), (6, True), (8, True)]
    assert names(tmp_path / "hf") == ["2", "4", "6", "8"]


def test_what_stays_for_an_export_alone_goes_with_it(tmp_path, monkeypatch):
    """The exports of all steps wait until the last one is saved, with one checkpoint to keep."""
    is_saved = threading.Event()
    write = exporter.export_step

    def wait(*given):
        assert is_saved.wait(60)
        write(*given)

    class Watched(exporter.Exporter):
        def held(self):
            steps = super().held()
            if 6 in steps:
                assert steps == {2, 4, 6}
                is_saved.set()
            return steps

    monkeypatch.setattr(exporter, "export_step", wait)
    monkeypatch.setattr(exporter, "Exporter", Watched)
    train(tmp_path, 6, keep_last=1)
    assert names(tmp_path / "hf") == ["2", "4", "6"]
    assert names(tmp_path / "checkpoints") == ["6"]


def test_what_is_given_up_is_still_held(tmp_path, monkeypatch):
    """A save that ends behind the exports must not delete what the next start exports."""
    has_begun = threading.Event()

    def write(config, directory, step, say, look):
        while step == 4:
            has_begun.set()
            look()

    monkeypatch.setattr(exporter, "export_step", write)
    config = configs.Config(checkpoint=configs.Checkpoint(export="hf", export_every_steps=2))
    own = exporter.Exporter(config, tmp_path, print)
    for step in (2, 3, 4, 6):
        own.take(step)
    assert has_begun.wait(60) and own.held() == {4, 6}
    own.close()
    assert own.held() == {4, 6}


def test_a_disk_that_is_full_ends_the_run(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", fail)
    with pytest.raises(SaveFailed, match="No space left"):
        train(tmp_path, 6)
    assert names(tmp_path / "hf") == []

    monkeypatch.undo()
    train(tmp_path, 6)
    assert "6" in names(tmp_path / "hf")


KILL = """
import os, sys
sys.path[:0] = {paths!r}
import test_exporter as own
from gpt_jax.run import convert

read = convert.read_slice
count = 0
def die(*args):
    global count
    count += 1
    if count == 4:
        os._exit(9)
    return read(*args)
convert.read_slice = die
own.train(own.Path({workdir!r}), 4)
"""


def test_a_kill_leaves_no_half_directory(tmp_path):
    """The run goes on from the checkpoint, and writes the directory that was missed."""
    paths = [str(Path(__file__).parent), *sys.path]
    script = KILL.format(paths=paths, workdir=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert names(tmp_path / "hf") == ["2.unfinished"]

    lines = train(tmp_path, 4)
    assert any("2.unfinished was not finished, and is removed" in line for line in lines)
    steps = names(tmp_path / "hf")
    assert "4" in steps and not any("unfinished" in name for name in steps)
    if any("resumed from step 2" in line for line in lines):
        assert "2" in steps


def test_a_resume_writes_what_was_missed(tmp_path):
    """The checkpoint that was not exported need not be the one from which the run goes on."""
    train(tmp_path, 5)
    for step in (4, 5):
        shutil.rmtree(tmp_path / f"hf/{step}")
    train(tmp_path, 6)
    assert names(tmp_path / "hf") == ["2", "4", "6"]


def test_without_a_form_there_is_nothing_to_write():
    with pytest.raises(UsageError, match=r"config.checkpoint.export_every_steps = 2: has no form"):
        gpt_jax.build(values(4, export="none"), say=lambda line: None)
