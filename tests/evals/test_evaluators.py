"""The table of evaluators: a row is asked for by name, and what it gives is written."""

import json
import lzma

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.evals import EVALUATORS, average_by_source, compute_heldout_metrics
from gpt_jax.evals.evaluators import Evaluation, run_evaluators
from gpt_jax.metrics.writers import read_jsonl

SIZES = ("--config.train.steps=4", "--config.eval.every_steps=2", "--config.eval.batches=2")


def count_weights(evaluation: Evaluation) -> dict[str, float]:
    """A new evaluator: the norm of the parameters."""
    squares = [float((x**2).sum()) for x in jax.tree.leaves(evaluation.params)]
    return {"eval/weights": sum(squares) ** 0.5, "sample/about": f"step {evaluation.step}"}


def test_a_new_evaluator_is_a_row_and_a_name(tmp_path, monkeypatch, capsys):
    """Its numbers and texts are in metrics.jsonl at each evaluation, and the others are unmoved."""
    monkeypatch.setitem(EVALUATORS, "weights", count_weights)
    monkeypatch.setattr(configs.field_checks, "EVALUATORS", tuple(EVALUATORS))
    plain = runs.build(runs.load(tmp_path, *SIZES))
    runs.run(plain, tmp_path / "plain")
    asked = runs.load(tmp_path, *SIZES, "--config.eval.evaluators=('heldout','xz','weights')")
    runs.run(runs.build(asked), tmp_path / "asked")

    for name in ("eval/loss", "eval/perplexity", "train/loss"):
        assert runs.curve(tmp_path / "asked", name) == runs.curve(tmp_path / "plain", name)
    weights = runs.curve(tmp_path / "asked", "eval/weights")
    norms = runs.curve(tmp_path / "asked", "train/param_norm")
    assert weights == pytest.approx({step: norms[step] for step in (2, 4)}, rel=1e-4)
    rows = read_jsonl(tmp_path / "asked" / "metrics.jsonl")
    texts = [row["sample/about"] for row in rows if "sample/about" in row]
    assert texts == ["step 2", "step 4"]

    held = plain.data.heldout["text"]
    text = plain.data.tokenizer.decode_bytes(held.ids(0, held.size))
    bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert set(runs.curve(tmp_path / "asked", "eval/xz_bits_per_byte").values()) == {bits}

    # The command asks the same table of a checkpoint.
    capsys.readouterr()
    given = f"--checkpoint={tmp_path / 'asked'}", "--evaluators", "xz", "heldout", "--json"
    runs.call("evaluate", *given, "--batches=2")
    found = json.loads(capsys.readouterr().out)
    last = runs.curve(tmp_path / "asked", "eval/loss")[4]
    assert found["evaluators"]["eval/xz_bits_per_byte"] == bits
    assert found["evaluators"]["eval/loss"] == pytest.approx(last, rel=1e-4)
    assert found["sources"]["held-out"]["loss"] == pytest.approx(last, rel=1e-4)

    saved = json.loads((tmp_path / "asked" / "config.json").read_text())
    assert saved["eval"]["evaluators"] == ["heldout", "xz", "weights"]


def test_sources_are_averaged_by_their_shares():
    """Without a run: two sources, of which the second is three quarters of the rows."""

    def sums(loss: float, tokens: float):
        pair = np.float32(loss * tokens), np.float32(tokens)
        return dict.fromkeys(("objective", "loss", "accuracy", "bits_per_byte"), pair)

    found = {"a": sums(2.0, 10), "b": sums(4.0, 30)}
    evaluation = Evaluation(
        model=configs.Model(),
        compute=configs.Compute(),
        knobs=configs.Eval(),
        params={},
        data=None,
        step=1,
        seed=0,
        sum_heldout=lambda: found,
        shares={"a": 0.25, "b": 0.75},
    )
    numbers, texts = run_evaluators(evaluation)
    metrics = {name: compute_heldout_metrics(own) for name, own in found.items()}
    assert numbers == average_by_source(metrics, evaluation.shares) and not texts
    assert numbers["eval/loss"] == 3.5 and numbers["eval/b/loss"] == 4.0
    assert run_evaluators(evaluation._replace(sum_heldout=dict)) == ({}, {})


def test_a_source_that_holds_nothing_out_does_not_hide_the_other():
    """The mean is that of one source, and the log says of which."""
    numbers = average_by_source({"a": {"loss": 3.0}}, {"a": 0.6, "b": 0.4})
    assert numbers["eval/loss"] == numbers["eval/a/loss"] == 3.0
    assert "eval/a/loss" not in average_by_source({"a": {"loss": 3.0}}, {"a": 1.0})


def test_names_that_cannot_be(tmp_path):
    code, line = runs.refusal(
        *runs.arguments(tmp_path, tmp_path / "run", "--config.eval.evaluators=('heldout','chess')")
    )
    assert (
        code == 2
        and "config.eval.evaluators" in line
        and "choose among heldout, samples, xz" in line
    )
    code, line = runs.refusal(
        *runs.arguments(
            tmp_path,
            tmp_path / "run",
            "--config.eval.evaluators=('xz',)",
            "--config.checkpoint.keep_best=1",
        )
    )
    assert code == 2 and "keep_best = 1" in line
    given = "evaluate", f"--checkpoint={tmp_path / 'none'}", "--evaluators"
    code, line = runs.refusal(*given, "chess")
    names = "heldout, samples, xz, questions, classification"
    assert code == 2 and line == f"--evaluators=chess: choose among {names}"
    code, line = runs.refusal(*given, "xz", "--text=README.md")
    assert code == 2 and "leave out --text" in line
