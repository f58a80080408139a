"""The ten lines of Python in the README."""

import subprocess
import sys

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
    with pytest.raises(UsageError, match=r"max_new_token = 5: .*max_new_tokens"):
        gpt_jax.generate(model, "text ", max_new_token=5)
    with pytest.raises(UsageError, match="prompts: 3 is no text"):
        gpt_jax.generate(model, ["text ", 3])
    with pytest.raises(UsageError, match="temperature = -1"):
        gpt_jax.generate(model, ["text "], temperature=-1.0)
    with pytest.raises(UsageError, match=r"config\.model\.layer = 1: .*did you mean"):
        gpt_jax.build({"model": {"layer": 1}})


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, gpt_jax; print([m for m in ('jax', 'flax', 'grain') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert set(gpt_jax.__all__) == {"build", "generate", "load", "run_training"}
