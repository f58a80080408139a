"""The ten lines of Python in the README."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import gpt_jax
from gpt_jax.errors import UsageError

CONFIG = {
    "model": {"layers": 1, "embed": 16, "heads": 2},
    "data": {"tokenizer": "bytes", "split": "document", "eval_fraction": 0.2},
    "train": {"steps": 3, "batch_size": 8, "seq_len": 32},
    "log": {"progress": False},
    "eval": {"sample_tokens": 4},
}


def test_train_load_generate(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} of some length\n" * 5)
    data = CONFIG["data"] | {"path": (str(tmp_path),), "cache": str(tmp_path / "cache")}
    workdir = str(tmp_path / "run")

    parts = gpt_jax.build(CONFIG | {"data": data})
    gpt_jax.run_training(parts, workdir)

    model = gpt_jax.load(workdir, devices=1)
    assert model.step == 3
    texts = gpt_jax.generate(model, ["text ", "num"], max_new_tokens=5, num_samples=2, seed=1)
    assert len(texts) == 4
    assert texts == gpt_jax.generate(
        model, ["text ", "num"], max_new_tokens=5, num_samples=2, seed=1
    )
    one = gpt_jax.generate(model, "text ", max_new_tokens=5, num_samples=2, seed=1)
    assert one == texts[:2]
    assert model.generate("text ", max_new_tokens=5, num_samples=2, seed=1) == one
    check_scores(model)
    with pytest.raises(UsageError, match=r"max_new_token = 5: .*max_new_tokens"):
        gpt_jax.generate(model, "text ", max_new_token=5)
    with pytest.raises(UsageError, match="prompts: 3 is no text"):
        gpt_jax.generate(model, ["text ", 3])
    with pytest.raises(UsageError, match="temperature = -1"):
        gpt_jax.generate(model, ["text "], temperature=-1.0)
    with pytest.raises(UsageError, match=r"config\.model\.layer = 1: .*did you mean"):
        gpt_jax.build({"model": {"layer": 1}})


def check_scores(model):
    """Texts and ids, alone and in lists, are read off the same logits."""
    ids = model.tokenizer.encode("text number").tolist()
    logits = model.logits("text number")
    assert logits.shape == (11, 257) and logits.dtype == np.float32
    with pytest.raises(UsageError, match=r"ids: have the shape \(1, 2\)"):
        model.logits([[1, 2]])
    assert (model.logits(ids) == logits).all() and (model.logits(np.array(ids)) == logits).all()
    logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(10), ids[1:]]
    number = logprobs[-6:].sum()

    assert model.score("text ", "number") == pytest.approx(number + logprobs[3], abs=1e-4)
    assert model.score(ids[:5], ids[5:]) == pytest.approx(number, abs=1e-4)
    assert model.score(np.array(ids[:5]), ids[5:]) == model.score(ids[:5], ids[5:])
    one, other = model.score("text", [" number", " n"])
    assert one == pytest.approx(number + logprobs[3], abs=1e-4)
    assert other == pytest.approx(logprobs[3] + logprobs[4], abs=1e-4)
    assert model.score(["text", "text "], [" number", "number"]) == pytest.approx([one, one])
    assert model.score([ids[:5], ids[:4]], [ids[5:], ids[4:]])[1] == pytest.approx(one, abs=1e-4)
    assert model.score("text", []) == [] and model.score(["text"], [" n"]) == [other]
    assert model.score("", "t") == pytest.approx(model.score([256], ids[:1]))
    assert model.score([], ids[:1]) == model.score(np.array([]), ids[:1]) == model.score("", "t")
    assert model.score([], [ids[:1], ids[:2]]) == pytest.approx(
        [model.score("", "t"), model.score("", "te")]
    )
    assert model.score([[], ids[:1]], [ids[:1], ids[1:2]]) == pytest.approx(
        [model.score("", "t"), model.score("t", "e")]
    )
    assert model.logits("").shape == (1, 257)

    said = []
    assert model.score("a" * 40, "b", said.append) < 0 and "1 of 1 requests" in said[0]
    for context, continuation, words in (
        (["a", "b"], ["c"], "2 contexts and 1 continuations"),
        (["a"], "c", None),
        ([], ["c"], "0 contexts and 1 continuations"),
        ([], "c", "0 contexts and 1 continuations"),
        ("a", [1, 2], "pair 1: one part is a text and the other is ids"),
        ("a", "", "its continuation has no tokens"),
        ([], [], None),
        ([1], [999], "has the id 999; expected 0 to 256"),
    ):
        if words is None:
            assert isinstance(model.score(context, continuation), list)
            continue
        with pytest.raises(UsageError, match=words):
            model.score(context, continuation)
    with pytest.raises(UsageError, match="the text has 33 tokens and the model's context holds"):
        model.logits("a" * 33)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, gpt_jax; print([m for m in ('jax', 'flax', 'grain') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert set(gpt_jax.__all__) == {"build", "generate", "load", "run_training"}
