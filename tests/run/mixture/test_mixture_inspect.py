"""`gpt-jax inspect` names every row of a run on a mixture."""

import json
import shutil

import jax
import pytest
import runs
from mixtures import run_stream
from prepared import texts, write_jsonl


@pytest.mark.parametrize("step", [1, 20])
def test_inspect_names_every_row_of_a_step(folder, whole, capsys, step):
    """The command has the config and the seed alone.

    The documents are in the files that it names, and the ids are those of the batch that the run
    had.
    """
    capsys.readouterr()
    runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batch = next(run_stream(whole, step - 1))
    assert len(rows) == 24
    for row, ids in zip(rows, batch["tokens"], strict=False):
        assert row["ids"][:32] == ids[: len(row["ids"])].tolist()[:32]
        for document in row["documents"]:
            name, _, line = document["name"].rpartition(":")
            text = json.loads((folder / name).read_text().split("\n")[int(line) - 1])["text"]
            shown = document["text"].strip("\ufffd")  # a row may begin or end within a character
            assert shown in text and (document["offset"] or text.startswith(shown))
    runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--rows=2")
    shown = capsys.readouterr().out
    assert shown.count("\nrow ") == 1 and shown.startswith("row 0: example ")
    assert rows[0]["documents"][0]["name"] in shown


def test_inspect_takes_no_accelerator(whole, capsys):
    """The run itself may be using it, so JAX gets the platform of the CPU alone."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        runs.call("inspect", f"--workdir={whole}", "--batch=1", "--rows=1")
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_inspect_says_that_a_step_is_beyond_the_last(whole, capsys):
    for step, said in ((24, False), (25, True)):
        runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--rows=1")
        assert (f"step {step} is beyond the run's last, 24" in capsys.readouterr().err) == said


def test_inspect_refuses_what_is_not_there(folder, whole, tmp_path):
    assert (
        "no run has begun there" in runs.refusal("inspect", f"--workdir={tmp_path}", "--batch=1")[1]
    )
    code, line = runs.refusal("inspect", f"--workdir={whole}", "--batch=0")
    assert code == 2 and line == "--batch=0: expected 1 to 1,000,000,000,000"
    assert (
        "--rows=-1: expected 0 or more"
        in runs.refusal("inspect", f"--workdir={whole}", "--batch=1", "--rows=-1")[1]
    )
    (tmp_path / "config.json").write_text('{"model": {"layers": "x"}}')
    line = runs.refusal("inspect", f"--workdir={tmp_path}", "--batch=1")[1]
    assert f"{tmp_path}/config.json: config.model.layers = 'x': expected int" in line


def test_inspect_refuses_a_folder_prepared_again_with_another_tokenizer(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "a.jsonl", texts(60))
    flags = ["--input", str(rows), "--workers=1", f"--output={tmp_path / 'data'}"]
    runs.call("prepare", *flags)
    runs.call(
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.tokenizer=",
        "--config.train.steps=3",
        "--config.log.progress=false",
    )
    runs.call("inspect", f"--workdir={tmp_path / 'run'}", "--batch=1")
    shutil.rmtree(tmp_path / "data")
    runs.call("prepare", *flags, "--tokenizer=bpe:300")
    code, line = runs.refusal("inspect", f"--workdir={tmp_path / 'run'}", "--batch=1")
    assert code == 2 and "the text or its tokenizer has changed since the run" in line
