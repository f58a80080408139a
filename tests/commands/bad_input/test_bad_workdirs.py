"""Workdirs and checkpoints that do not fit, or that are damaged, are refused in one line."""

import fcntl
import json
import sys
from pathlib import Path

import pytest
import runs
from refusals import TEXT, on_data, refused

from gpt_jax.train import CHECKPOINT_FOLDER
from gpt_jax.train.checkpoint import manifest


def test_workdir_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()  # a path below a file: not even root can write there
    refused(
        2,
        [f"--workdir={tmp_path}/file/run", "cannot be written"],
        *runs.arguments(folder, tmp_path / "file/run"),
    )


WEIGHTS = [
    ["evaluate", "--checkpoint=URL"],
    ["generate", "--checkpoint=URL", "--prompt=a"],
    ["inspect", "--checkpoint=URL"],
    ["inspect", "--checkpoint=URL", "--verify"],
    ["convert", "--from=URL", "--to=out"],
]
WORKDIRS = [
    ["train", f"--config={runs.TINY}", "--workdir=URL"],
    ["inspect", "--batch=1", "--workdir=URL"],
    ["inspect", "--lineage", "--workdir=URL"],
]


@pytest.mark.parametrize("given", [*WEIGHTS, *WORKDIRS], ids=lambda given: given[0])
@pytest.mark.parametrize(
    "url, words",
    [
        ("gs://bucket/run", ["needs the package gcsfs", "pip install"]),
        ("s4://bucket/run", ["s4:// is no object store; known are gs://"]),
        ("https://host/run", ["https:// is no object store"]),
        ("gs://", ["names no folder"]),
    ],
)
def test_url_that_is_no_store(given, url, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    refused(2, [url, *words], *[text.replace("URL", url) for text in given])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, words",
    [
        (
            ["train", f"--config={runs.TINY}", "--workdir=memory:///a", "--branch=b"],
            ["--workdir=memory:///a: a branch needs folders"],
        ),
        (
            ["train", f"--config={runs.TINY}", "--workdir=a", "--branch=memory:///b"],
            ["--branch=memory:///b: a branch needs folders"],
        ),
        (["convert", "--from=a", "--to=ftp://b/c"], ["--to=ftp://b/c: ftp:// is no object store"]),
        (["convert", "--from=a", "--to=memory://"], ["--to=memory://: names no folder"]),
        (
            [
                "train",
                f"--config={runs.TINY}",
                "--workdir=memory:///a",
                "--print_config",
                "--config.init.model=checkpoint",
                "--config.init.from=b",
            ],
            ["--workdir=memory:///a: is not read for --print_config"],
        ),
        (
            ["train", f"--config={runs.TINY}", "--workdir=a", "--config.init.from=memory:///b@3"],
            ["config.init.from = 'memory:///b@3'", "no checkpoints there"],
        ),
        (["evaluate", "--checkpoint=memory:///a"], ["no checkpoints there; give a workdir"]),
    ],
)
def test_url_that_cannot_be_used_there(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(2, words, *given)


def test_mirror_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused(
        2,
        [f"config.checkpoint.mirror = '{tmp_path}/file'", "cannot be written"],
        "train",
        f"--config={runs.TINY}",
        "--config.data.path=stdlib",
        "--workdir=memory:///a",
        f"--config.checkpoint.mirror={tmp_path}/file",
    )


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.model.layers=3", ["config.model.layers (2 there, 3 now)"]),
        ("--config.model.embed=64", ["config.model.embed (32 there, 64 now)"]),
        ("--config.optim.optimizer=lion", ["config.optim.optimizer ('adamw' there, 'lion' now)"]),
    ],
)
def test_workdir_of_another_architecture(folder, trained, override, words):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    refused(
        2, [str(trained), *words, "another --workdir"], *runs.arguments(folder, trained, override)
    )
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_workdir_of_another_tokenizer(tmp_path):
    (tmp_path / "data").mkdir()
    for text in (TEXT * 40, TEXT * 40 + b"Z"):
        (tmp_path / "data/a.txt").write_bytes(text)
        command = on_data(
            tmp_path, "a.txt", "--config.data.tokenizer=char", "--config.model.vocab=64"
        )
        if b"Z" not in text:
            runs.call(*command)
    refused(2, [f"{tmp_path}/run", "another tokenizer", "another --workdir"], *command)


def test_workdir_of_another_text(tmp_path, capsys):
    """The content counts and not the name, on resume and when held-out text is split off again."""
    (tmp_path / "data").mkdir()
    first, second = (tmp_path / "data" / name for name in ("a.txt", "b.txt"))
    first.write_bytes(TEXT * 40)
    runs.call(*on_data(tmp_path, "a.txt"))
    second.write_bytes(first.read_bytes())
    runs.call(*on_data(tmp_path, "b.txt", "--config.train.steps=2", "--config.optim.decay_steps=1"))
    assert "config.data.path changed since the checkpoint" in capsys.readouterr().out
    second.write_bytes(TEXT.upper() * 40)
    refused(
        2, [f"{tmp_path}/run", "another text", "another --workdir"], *on_data(tmp_path, "b.txt")
    )
    refused(
        2,
        ["this text has changed since the run", "--text"],
        "evaluate",
        f"--checkpoint={tmp_path}/run",
    )
    second.unlink()
    refused(
        2,
        ["the run's own text", "b.txt", "no such file", "--text"],
        "evaluate",
        f"--checkpoint={tmp_path}/run",
    )


def test_workdir_in_use(folder, trained):
    with open(trained / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(
            42,
            [f"--workdir={trained}", "another run is training into it"],
            *runs.arguments(folder, trained),
        )


def test_profile_before_the_resumed_step(folder, copy):
    refused(
        2, ["--profile=2:4", "goes on at step 3"], *runs.arguments(folder, copy), "--profile=2:4"
    )


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_checkpoint_path_missing(trained, command):
    nearest = f"found {trained} (steps 1, 2)"
    refused(
        2,
        [f"'{trained.parent}/trianed': does not exist", nearest],
        command,
        f"--checkpoint={trained.parent}/trianed",
    )
    refused(2, ["no step 7", "1, 2"], command, f"--checkpoint={trained}", "--step=7")
    refused(2, ["no step -1", "1, 2"], command, f"--checkpoint={trained}", "--step=-1")
    refused(
        2, ["is step 1, but step 2"], command, f"--checkpoint={trained}/checkpoints/1", "--step=2"
    )


def test_evaluate_text_missing(trained):
    refused(
        2,
        ["--text = 'none.txt'", "no such file"],
        "evaluate",
        f"--checkpoint={trained}",
        "--text",
        "none.txt",
    )


def damage(workdir: Path, *steps: int) -> None:
    """Flips a bit in the largest file of each step."""
    for step in steps:
        file = max(
            (workdir / CHECKPOINT_FOLDER / str(step)).rglob("*"),
            key=lambda p: p.is_file() and p.stat().st_size,
        )
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)


def test_no_valid_checkpoint(folder, copy):
    damage(copy, 1, 2)
    words = [str(copy), "no valid checkpoint", "step 2: ", "step 1: ", "sha256"]
    refused(51, words, "evaluate", f"--checkpoint={copy}")
    refused(51, words, "generate", f"--checkpoint={copy}")
    refused(51, words, *runs.arguments(folder, copy))
    refused(51, ["step 2", "damaged"], "generate", f"--checkpoint={copy}", "--step=2")


def test_damaged_newest_is_named_and_passed_over(copy, capsys):
    damage(copy, 2)
    runs.call("generate", f"--checkpoint={copy}", "--prompt=a", "--max_new_tokens=1")
    output = capsys.readouterr().err
    assert (
        "checkpoint step 2 in" in output
        and "is damaged and is passed over" in output
        and "sha256" in output
    )
    assert f"step 1 of {copy}" in output


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": 3}, ["config: expected an object, got 3"]),
        ({"data": {"next": 2}}, ["data.content: missing"]),
        ({"tokenizer": "{}"}, ["its tokenizer cannot be used", "kind: missing"]),
    ],
)
def test_a_checkpoint_of_another_shape(copy, changes, words):
    """Its digests are right: whoever can write there can seal what they like."""
    for step in ("1", "2"):
        folder = copy / CHECKPOINT_FOLDER / step
        meta = json.loads((folder / "meta.json").read_bytes())
        (folder / "meta.json").write_text(json.dumps(meta | changes))
        manifest.write_manifest(folder)
    refused(51, words, "generate", f"--checkpoint={copy}", "--prompt=a")


def test_a_log_keeps_no_run_from_going_on(folder, copy, capsys):
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines + '{"step": 1, "train/loss": "low"}\n')
    (copy / "config.json").unlink()
    more = runs.arguments(folder, copy, "--config.train.steps=3")
    runs.call(*more)
    assert "left out" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 3

    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    runs.call(*runs.arguments(folder, copy, "--config.train.steps=4"))
    assert "is a folder, where a file belongs" in capsys.readouterr().out


def test_a_config_of_a_workdir_that_is_none(copy):
    for text in ("[" * 200_000, "[1]", '{"data": 3}', "\xff"):
        (copy / "config.json").write_bytes(text.encode("latin-1"))
        ending, _ = runs.refusal("inspect", f"--workdir={copy}", "--batch=1")
        assert ending == 2
