"""A run whose workdir is a URL is that of a folder: its losses, and what reads it afterwards."""

import contextlib
import io
import json
import shutil
import sys

import fsspec
import pytest
import runs
import stores

import gpt_jax
from gpt_jax.errors import SaveFailed
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.run import fetch, lease, store

STEPS = "--config.train.steps=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the text, `local`, which is a run in a folder, and the mirrors of runs in stores."""
    folder = tmp_path_factory.mktemp("stores")
    runs.call(*stores.arguments(folder, str(folder / "local")))
    return folder


@pytest.fixture(scope="module")
def remote(folder):
    """A run in memory whose second part ran on another machine, which had no mirror of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "SETTLE_SECONDS", 0.01)
        patch.setattr(store, "WAITS", (0.01, 0.01))
        stores.empty()
        runs.call(*stores.arguments(folder, stores.URL, STEPS))
        shutil.rmtree(folder / "mirror")
        runs.call(*stores.arguments(folder, stores.URL))
        yield stores.URL
        stores.empty()


def output(*given) -> str:
    """What a command prints."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(stream):
        runs.call(*given)
    sys.stdout.flush()
    stream.flush()
    return stream.buffer.getvalue().decode()


def curves(rows) -> dict:
    """Every loss by step and name."""
    return {
        (row["step"], key): value
        for row in rows
        for key, value in row.items()
        if key in ("train/loss", "train/grad_norm", "eval/loss")
    }


def test_a_run_in_a_store_has_the_losses_of_one_in_a_folder(folder, remote, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(stores.read("metrics.jsonl"))
    found = curves(read_jsonl(tmp_path / "metrics.jsonl"))
    assert found == curves(read_jsonl(folder / "local/metrics.jsonl"))
    assert len(found) == 15  # six steps with two values, three evaluations
    assert {"config.json", "loss.png", "report.html"} <= set(stores.listed())


def test_the_policy_holds_in_the_store(remote):
    assert stores.sealed() == [4, 6]


def test_readers_get_from_a_url_what_they_get_from_a_folder(folder, remote, tmp_path):
    mirror = f"--mirror={tmp_path}"
    local = f"--checkpoint={folder / 'local'}"
    there = f"--checkpoint={remote}"
    commands = (
        ("evaluate", "--json"),
        ("generate", "--prompt=ab", "--max_new_tokens=8", "--json"),
        ("inspect", "--json"),
    )
    for command in commands:
        mine = output(command[0], local, *command[1:])
        theirs = output(command[0], there, mirror, *command[1:])
        mine, theirs = (json.loads(text) | {"checkpoint": ""} for text in (mine, theirs))
        assert mine == theirs, command
    assert output("inspect", local, "--verify") == output("inspect", there, "--verify")
    assert "0 of 20 parameters differ" in output("inspect", local, f"--diff={remote}", mirror)


def test_inspect_shows_the_rows_of_a_run_at_a_url(folder, remote, tmp_path):
    given = ("inspect", "--batch=2", "--rows=1", f"--mirror={tmp_path}")
    mine = output(*given, f"--workdir={folder / 'local'}")
    assert output(*given, f"--workdir={remote}") == mine
    lineage = output("inspect", "--lineage", f"--workdir={remote}", f"--mirror={tmp_path}")
    assert lineage.startswith(f"{remote}: step 6, 1,536 tokens")


def test_convert_reads_a_url(folder, remote, tmp_path):
    runs.call("convert", "--from", remote, f"--to={tmp_path / 'a'}", f"--mirror={tmp_path / 'm'}")
    runs.call("convert", "--from", folder / "local", f"--to={tmp_path / 'b'}")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    # Others know the run by its URL, and not by the copy of it on this machine.
    given = ("--format=native", f"--to={tmp_path / 'c'}", f"--mirror={tmp_path / 'm'}")
    runs.call("convert", "--from", remote, *given)
    (entry,) = fetch.read_meta(tmp_path / "c/checkpoints", 0)["lineage"]
    assert (entry["from"], entry["step"]) == (remote, 6)


def test_a_refusal_names_the_url_and_not_the_copy_here(folder, remote):
    code, line = runs.refusal(*stores.arguments(folder, remote, "--config.seed=7"))
    assert code == 2 and line.startswith(f"{remote} holds a run with another config.seed")
    assert str(folder / "mirror") not in line


def test_python_loads_a_url(folder, remote, tmp_path):
    scores = [
        gpt_jax.load(path, devices=1, say=lambda line: None, mirror=str(tmp_path)).score("a", "b c")
        for path in (str(folder / "local"), remote)
    ]
    assert scores[0] == scores[1]


def test_python_trains_into_a_url(folder, remote):
    """The run there has ended, and is found so."""
    flags = [text for text in stores.arguments(folder, remote) if text.startswith("--config.")]
    said = []
    assert runs.run(runs.build(runs.load(folder, *flags), data=8), remote, said.append) is None
    assert any(f"finished before, at step 6: see {remote}/report.html" in line for line in said)


def test_a_run_starts_from_the_weights_at_a_url(folder, remote, tmp_path):
    """With the optimiser's moments, which other readers leave out."""
    losses = []
    for name, path in (("a", folder / "local"), ("b", remote)):
        runs.call(
            *stores.arguments(
                folder,
                str(tmp_path / name),
                f"--config.init.from={path}@4",
                "--config.init.optimizer=true",
                "--config.init.model=checkpoint",
                "--config.train.steps=2",
            )
        )
        losses.append(curves(read_jsonl(tmp_path / name / "metrics.jsonl")))
    assert losses[0] == losses[1] and losses[0]
    directory, step = fetch.find_checkpoint(str(tmp_path / "b"), 0, print)
    assert fetch.read_meta(directory, step)["lineage"][0]["from"] == remote


@pytest.mark.usefixtures("quick_store")
def test_a_store_that_goes_away_ends_the_run_with_50_and_loses_nothing(folder, monkeypatch):
    url = "memory:///bucket/away"
    given = stores.arguments(folder, url)
    put = type(fsspec.filesystem("memory")).put_file

    gone = []

    def fail_from_4(self, source, target, **more):
        gone.extend(["from now on"] * ("checkpoints/4/" in target))
        if gone:
            raise OSError("no route to host")
        put(self, source, target, **more)

    with monkeypatch.context() as away:
        away.setattr(type(fsspec.filesystem("memory")), "put_file", fail_from_4)
        code, line = runs.refusal(*given)
    assert code == SaveFailed.code and "no route to host" in line and "the same command" in line
    mirror = fetch.find_folder(str(folder / "mirror"), "runs", url)
    trained = curves(read_jsonl(mirror / "metrics.jsonl"))
    assert (4, "train/loss") in trained

    said = output(*given)
    assert f"checkpoint step 4 is sent to {url} now" in said and "resumed from step 4" in said
    local = curves(read_jsonl(folder / "local/metrics.jsonl"))
    assert curves(read_jsonl(mirror / "metrics.jsonl")) == local
    files = fsspec.filesystem("memory")
    assert files.cat_file("/bucket/away/metrics.jsonl") == (mirror / "metrics.jsonl").read_bytes()


@pytest.fixture
def quick_store(monkeypatch):
    """Waits of milliseconds."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(store, "WAITS", (0.01, 0.01))


@pytest.mark.usefixtures("quick_store")
def test_a_second_run_in_the_same_url_is_refused(folder, tmp_path):
    url = "memory:///bucket/taken"
    first = stores.open_mirror(tmp_path, [], url=url)
    first.begin()
    code, line = runs.refusal(*stores.arguments(folder, url))
    assert code == 42 and line.startswith(f"--workdir={url}: another run is training into it")
    first.end(None)


def test_two_processes_train_into_a_url(folder, tmp_path):
    """They share a mirror, and process 0 sends what both have written."""
    url = f"file://{tmp_path}/bucket/run"
    for process in runs.job(tmp_path / "logs", 2, stores.arguments(folder, url, STEPS)):
        process.end(0)
    found = curves(read_jsonl(tmp_path / "bucket/run/metrics.jsonl"))
    local = curves(read_jsonl(folder / "local/metrics.jsonl"))
    assert found == pytest.approx({key: local[key] for key in found}, rel=1e-4)
    assert output("inspect", f"--checkpoint={url}", "--verify").split("\n") == [
        "step 2: whole",
        "step 4: whole",
        "",
    ]


def test_processes_that_share_no_mirror_are_refused(folder, tmp_path):
    given = stores.arguments(folder, f"file://{tmp_path}/bucket/run", "--config.mesh.data=2")
    own = [[f"--config.checkpoint.mirror={tmp_path / name}"] for name in "ab"]
    job = runs.job(tmp_path / "logs", 2, given, own=own)
    for process in job:
        process.end(2)
    assert "config.checkpoint.mirror" in job[0].err and "do not share" in job[0].err
