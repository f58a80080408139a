"""`gpt-jax evaluate` measures what the run measured, and what a plain forward pass gives."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from gpt_jax import evals
from gpt_jax.commands import evaluate_tasks
from gpt_jax.data.tokens.cache import load_text
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.model.transformer import Transformer
from gpt_jax.run import restore as load
from gpt_jax.run.restore import restore_checkpoint
from gpt_jax.train import CHECKPOINT_FOLDER


def heldout(workdir: Path, step: int) -> dict[str, float]:
    """What the run itself measured."""
    return {
        name: runs.curve(workdir, f"eval/{name}")[step]
        for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }


def same(row: dict, expected: dict) -> None:
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_evaluate_measures_what_the_run_measured(call, trained):
    """It has all 8 devices along fsdp, and the run had 2 x 2 x 2."""
    for step, flags in ((10, []), (5, ["--step=5"])):
        out, err = call("evaluate", f"--checkpoint={trained}", "--json", *flags)
        report = json.loads(out)
        assert report["step"] == step and report["checkpoint"] == str(trained / CHECKPOINT_FOLDER)
        assert list(report["sources"]) == ["held-out"]
        row = report["sources"]["held-out"]
        same(row, heldout(trained, step))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(
            row["loss"] * row["tokens"] / row["bytes"] / math.log(2), rel=1e-5
        )
        assert f"step {step} of" in err and "on 8 " in err
    assert call("evaluate", f"--checkpoint={trained}/checkpoints/5", "--json")[0] == out
    assert call("evaluate", f"--checkpoint={trained}/checkpoints", "--step=5", "--json")[0] == out


def test_evaluate_in_a_process_of_its_own(tmp_path, trained):
    """One device, and three that divide neither width nor batch, give the same numbers.

    Standard output has these numbers alone.
    """
    jobs = [
        runs.Process(tmp_path, ["evaluate", f"--checkpoint={trained}", "--json", *flags])
        for flags in ([], ["--cpu_devices=3"])
    ]
    for process, devices in zip(jobs, ("on 1 cpu device", "on 3 cpu devices"), strict=False):
        process.end(0)
        same(json.loads(process.out)["sources"]["held-out"], heldout(trained, 10))
        assert devices in process.err


def test_evaluate_per_source(call, trained, tmp_path):
    """The rows are the sources in the order given, and `all`, which is their sum.

    The table and the JSON agree.
    """
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, words in zip(files, (30, 200), strict=False):
        runs.write_text(file, words)
    command = "evaluate", f"--checkpoint={trained}", "--text", *files
    rows = json.loads(call(*command, "--json")[0])["sources"]
    assert list(rows) == [*map(str, files), "all"]
    a, b, total = rows.values()
    for name in ("tokens", "bytes"):
        assert total[name] == a[name] + b[name]
    assert [a["bytes"], b["bytes"]] == [
        len(file.read_bytes()) - 1 for file in files
    ]  # nothing predicts the first one
    for name in ("loss", "accuracy"):
        assert total[name] == pytest.approx(
            (a[name] * a["tokens"] + b[name] * b["tokens"]) / total["tokens"], rel=1e-5
        )
    header, *lines = call(*command)[0].splitlines()
    assert header.split() == [
        "source",
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "tokens",
        "bytes",
    ]
    for line, (name, row) in zip(lines, rows.items(), strict=True):
        assert line.split() == [
            name,
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['accuracy']:.4f}",
            f"{row['tokens']:,.0f}",
            f"{row['bytes']:,.0f}",
        ]
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned


def test_evaluate_equals_a_plain_forward_pass(call, trained, tmp_path):
    file = runs.write_text(tmp_path / "a.txt", 100)
    report = json.loads(call("evaluate", f"--checkpoint={trained}", f"--text={file}", "--json")[0])[
        "sources"
    ][str(file)]
    loaded = load.load_model(str(trained), 0, lambda line: None, 1)
    text = load_text((str(file),), loaded.tokenizer, loaded.config.data, report=lambda line: None)
    ids = text.ids(0, text.size).astype(np.int32)
    starts = range(0, len(ids) - 1, 32)  # rows in order, none of which sees the one before
    losses, hits = [], []
    with jax.set_mesh(loaded.mesh):
        forward = jax.jit(
            lambda tokens: Transformer(loaded.config.model, loaded.config.compute).apply(
                {"params": loaded.params}, {"tokens": tokens}
            )
        )
        for start in starts:
            row = ids[start : start + 33]
            tokens = np.zeros(32, np.int32)
            tokens[: len(row) - 1] = row[:-1]
            logits = np.asarray(forward(tokens[None]), np.float64)[0, : len(row) - 1]
            losses += list(
                np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]
            )
            hits += list(logits.argmax(-1) == row[1:])
    same(report, {"loss": np.mean(losses), "accuracy": np.mean(hits), "tokens": len(ids) - 1})
    some = json.loads(
        call(
            "evaluate",
            f"--checkpoint={trained}",
            f"--text={file}",
            "--json",
            "--batches=1",
            "--batch_size=2",
        )[0]
    )["sources"][str(file)]
    assert some["tokens"] == 8 * 32 == 256  # two rows, rounded up to one for each device


def test_a_checkpoint_that_its_run_deletes_meanwhile(trained, tmp_path, monkeypatch):
    """The newest one is looked for again. One that was asked for by its step is not replaced."""
    run, restore = Path(shutil.copytree(trained, tmp_path / "run")), restore_checkpoint

    def deleted(directory, step, wanted):
        if step == 10:
            shutil.rmtree(directory / "10", ignore_errors=True)
        return restore(directory, step, wanted)

    monkeypatch.setattr(load, "restore_checkpoint", deleted)
    lines = []
    assert load.load_model(str(run), 0, lines.append, 1).step == 5
    assert any("step 10 of" in line and "deleted by its run meanwhile" in line for line in lines)
    shutil.copytree(trained / "checkpoints/10", run / "checkpoints/10")
    with pytest.raises(NoCheckpoint):
        load.load_model(str(run), 10, lines.append, 1)


def test_results_outlive_a_file_that_cannot_be_written(trained, tmp_path, capsys, monkeypatch):
    """The metrics are printed and the exit code is 50. A closed output keeps no file from disk."""
    results = {
        "results": {"riddles": {"acc,none": 0.25, "acc_stderr,none": 0.125}},
        "n-shot": {"riddles": 0},
        "samples": {"riddles": ["é"]},
    }
    monkeypatch.setattr(evals, "run_tasks", lambda *given: results)
    given = "evaluate", f"--checkpoint={trained}", "--lm_eval=riddles"
    long = tmp_path / ("x" * 300)
    for flag, expected in (("--json", '"acc"'), (None, "riddles  0      acc     0.2500  0.1250")):
        capsys.readouterr()
        code, line = runs.refusal(*given, f"--lm_eval_out={long}", *filter(None, [flag]))
        assert code == 50 and line.startswith(f"--lm_eval_out={long}: cannot be written: ")
        assert "\n" not in line and expected in capsys.readouterr().out

    out = tmp_path / "results.json"

    def fail(text):
        raise UsageError("standard output is full")

    monkeypatch.setattr(evaluate_tasks, "emit", fail)
    assert runs.refusal(*given, f"--lm_eval_out={out}") == (2, "standard output is full")
    assert json.loads(out.read_text()) == results
