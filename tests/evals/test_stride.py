"""Held-out loss over sliding rows equals a plain loop that scores each token with its window."""

import json
import math

import jax
import numpy as np
import pytest
import runs

from gpt_jax.data.stream.dataset import load_heldout
from gpt_jax.run import restore

T = 32  # tokens of a row of configs/tiny.py


@pytest.fixture(scope="module", params=["together", "apart"])
def checkpoint(request, tmp_path_factory):
    """A run on one device that slides by 10, with documents of a row together or apart."""
    folder = tmp_path_factory.mktemp(request.param)
    runs.write_text(folder / "text.jsonl", 3000, documents=60)
    given = runs.arguments(
        folder,
        folder / "run",
        f"--config.data.path={folder / 'text.jsonl'}",
        f"--config.data.document_mask={request.param == 'apart'}",
        "--config.data.eval_fraction=0.05",
        "--config.train.steps=4",
        "--config.eval.every_steps=4",
        "--config.eval.stride=10",
    )
    runs.call(*given)
    return folder / "run"


def list_windows(tokens, stride: int, is_apart: bool):
    """(ids that a target sees, target) of each token: its window, cut where its document begins."""
    ids = tokens.ids(0, tokens.size).astype(np.int64)
    documents = set(tokens.offsets[:-1].tolist())
    for place in range(1, len(ids)):
        row = max(0, math.ceil((place - T) / stride))
        begin = row * stride
        if is_apart:
            if place in documents:
                continue
            begin = max(begin, *(start for start in documents if start < place))
        yield ids[begin:place], int(ids[place])


def score_plainly(loaded, tokens, stride: int) -> dict[str, float]:
    """Loss and bits a byte by one forward pass for each token."""
    losses = []
    size = 0
    for seen, target in list_windows(tokens, stride, loaded.config.data.document_mask):
        logits = loaded.logits(seen)[-1].astype(np.float64)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
        size += int(loaded.tokenizer.token_bytes[target])
    total = sum(losses)
    return {
        "loss": total / len(losses),
        "bits_per_byte": total / size / math.log(2),
        "tokens": len(losses),
        "bytes": size,
    }


def evaluate(capsys, run, *flags) -> dict[str, float]:
    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={run}", "--json", *flags)
    (row,) = json.loads(capsys.readouterr().out)["sources"].values()
    return row


@pytest.fixture
def stirred(monkeypatch):
    """Weights are read with noise, because what a tiny run has learned needs no context."""
    original = restore.restore_checkpoint

    def add_noise(leaf):
        noise = np.random.default_rng(leaf.size).normal(0, 0.5, leaf.shape)
        return jax.device_put(np.asarray(leaf) + noise.astype(leaf.dtype), leaf.sharding)

    def read(*given):
        return jax.tree.map(add_noise, original(*given))

    monkeypatch.setattr(restore, "restore_checkpoint", read)


def test_a_plain_loop_gives_the_same(checkpoint, stirred, tmp_path, capsys):
    """A text of several documents, by one token and by 10."""
    text = tmp_path / "some.jsonl"
    runs.write_text(text, 40, documents=3)
    loaded = restore.load_model(str(checkpoint), 0, lambda line: None, 1)
    data = loaded.config.data
    (tokens,) = load_heldout(str(text), data, loaded.tokenizer, lambda line: None).values()
    disjoint = evaluate(capsys, checkpoint, f"--text={text}", "--stride=0")
    assert tokens.size > 3 * T
    for stride in (10, 1):
        row = evaluate(capsys, checkpoint, f"--text={text}", f"--stride={stride}")
        plain = score_plainly(loaded, tokens, stride)
        assert {name: row[name] for name in plain} == pytest.approx(plain, rel=1e-5)
        assert row["loss"] != pytest.approx(disjoint["loss"], rel=1e-3)
        assert (row["tokens"], row["bytes"]) == (disjoint["tokens"], disjoint["bytes"])


def test_a_stride_of_a_row_gives_the_numbers_of_disjoint_rows(checkpoint, capsys):
    """To the bit. Without the flag the stride is that of the run, whose log has the same number."""
    whole = evaluate(capsys, checkpoint, f"--stride={T}")
    assert whole == evaluate(capsys, checkpoint, "--stride=0")
    own = evaluate(capsys, checkpoint)
    assert own == evaluate(capsys, checkpoint, "--stride=10") != whole
    assert own["loss"] == pytest.approx(runs.curve(checkpoint, "eval/loss")[4], rel=1e-5)


def test_strides_that_leave_tokens_out(checkpoint, tmp_path):
    code, line = runs.refusal("evaluate", f"--checkpoint={checkpoint}", "--stride=33")
    assert code == 2 and "--stride=33: leaves tokens out" in line and "seq_len = 32" in line
    code, line = runs.refusal("evaluate", f"--checkpoint={checkpoint}", "--stride=-1")
    assert code == 2 and "--stride=-1: expected 0 or more" in line
    code, line = runs.refusal(
        *runs.arguments(tmp_path, tmp_path / "run", "--config.eval.stride=33")
    )
    assert code == 2 and "config.eval.stride = 33: leaves tokens out" in line
