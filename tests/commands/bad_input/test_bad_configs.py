"""A config that cannot be run is refused in one line."""

import pytest
import runs
from refusals import refused

CONFIGS = {
    "unknown key, near one": (
        ["--config.optim.learning_rat=1"],
        [
            "config.optim.learning_rat = '1'",
            "unknown key",
            "did you mean config.optim.learning_rate?",
        ],
    ),
    "unknown key, nothing near": (
        ["--config.log.xyzzy=1"],
        ["config.log.xyzzy", "known keys: every_steps"],
    ),
    "unknown section": (["--config.modle.heads=2"], ["config.modle", "did you mean config.model?"]),
    "a section": (["--config.model=2"], ["config.model = '2'", "is a section"]),
    "text for a number": (
        ["--config.train.steps=many"],
        ["config.train.steps = 'many'", "expected int"],
    ),
    "half a step": (["--config.train.steps=1.5"], ["config.train.steps = '1.5'", "expected int"]),
    "no truth value": (
        ["--config.model.tied=maybe"],
        ["config.model.tied = 'maybe'", "expected bool"],
    ),
    "not finite": (
        ["--config.optim.learning_rate=nan"],
        ["config.optim.learning_rate = nan", "finite"],
    ),
    "wrong entries": (
        ["--config.model.windows=(1,'a')"],
        ["config.model.windows[1] = 'a'", "expected int"],
    ),
    "below the range": (
        ["--config.model.layers=0"],
        ["config.model.layers = 0", "from 1 to 10000"],
    ),
    "above the range": (
        ["--config.model.dropout=1.5"],
        ["config.model.dropout = 1.5", "from 0.0 to 0.99"],
    ),
    "no such choice": (
        ["--config.model.norm=batch"],
        ["config.model.norm = 'batch'", "choose one of layernorm"],
    ),
    "stages": (
        ["--config.mesh.pipeline=8"],
        ["config.model.layers = 2", "config.mesh.pipeline = 8"],
    ),
    "batch over the mesh": (
        ["--config.train.batch_size=12"],
        ["config.train.batch_size = 12", "pipeline x data x fsdp x expert = 8", "try 16"],
    ),
    "batch over microbatches": (
        ["--config.train.accumulate=3"],
        ["config.train.batch_size = 8", "config.train.accumulate = 3"],
    ),
    "eval batch over the mesh": (
        ["--config.eval.batch_size=3"],
        ["config.eval.batch_size = 3", "pipeline x data x fsdp x expert = 8"],
    ),
    "heads do not divide": (
        ["--config.model.heads=5"],
        ["config.model.heads = 5", "config.model.embed = 32"],
    ),
    "kv heads do not divide": (
        ["--config.model.kv_heads=3"],
        ["config.model.kv_heads = 3", "config.model.heads = 4"],
    ),
    "heads over tensor": (
        ["--config.mesh.tensor=8"],
        ["config.model.heads = 4", "config.mesh.tensor = 8"],
    ),
    "vocab over tensor": (
        ["--config.mesh.tensor=4", "--config.model.vocab=258"],
        ["config.model.vocab = 258", "config.mesh.tensor = 4", "vocab_multiple"],
    ),
    "mesh larger than the machine": (
        ["--config.mesh.data=3"],
        ["config.mesh.data = 3", "8 devices"],
    ),
    "two free axes": (["--config.mesh.fsdp=-1"], ["config.mesh.fsdp = -1", "only one"]),
    "vocab below the tokenizer's": (
        ["--config.model.vocab=200"],
        ["config.model.vocab = 200", "tokenizer's 257", "set 0"],
    ),
    "row beyond the context": (
        ["--config.model.max_seq=16"],
        ["config.model.max_seq = 16", "seq_len = 32"],
    ),
    "warmup beyond the end": (
        ["--config.optim.warmup_steps=99"],
        ["config.optim.warmup_steps = 99", "step 20"],
    ),
    "no such tokenizer": (
        ["--config.data.tokenizer=words"],
        ["config.data.tokenizer = 'words'", "bytes, char, bpe:N"],
    ),
    "bpe too small": (
        ["--config.data.tokenizer=bpe:99"],
        ["config.data.tokenizer = 'bpe:99'", "at least 257"],
    ),
    "value embeddings over fsdp": (
        [
            "--config.model.value_embed=true",
            "--config.model.kv_heads=1",
            "--config.mesh.fsdp=8",
            "--config.model.head_dim=4",
            "--config.mesh.data=1",
        ],
        ["config.model.kv_heads = 1", "config.model.head_dim = 4", "fsdp x expert x context = 8"],
    ),
    "momentum with no decay": (
        ["--config.optim.muon_momentum_final=0.9"],
        ["config.optim.muon_momentum_final = 0.9", "config.optim.schedule = 'cosine'", "use wsd"],
    ),
    "smear beyond the width": (
        ["--config.model.smear=true", "--config.model.smear_gate=99"],
        ["config.model.smear_gate = 99", "config.model.embed = 32"],
    ),
    "no loss scaling": (
        ["--config.compute.dtype=float16"],
        ["config.compute.dtype = 'float16'", "float32, bfloat16"],
    ),
    "sample prompt of unknown characters": (
        ["--config.data.tokenizer=char", "--config.eval.sample_prompts=('a','Z')"],
        ["config.eval.sample_prompts[1] = 'Z'", "character 0", "char tokenizer"],
    ),
    "sample prompt beyond the context": (
        ["--config.eval.sample_prompts=('a','%s')" % ("b" * 40)],
        ["config.eval.sample_prompts[1]", "40 tokens", "context of 32", "shorten"],
    ),
    "decay before the warmup ends": (
        [
            "--config.optim.schedule=wsd",
            "--config.optim.decay_fraction=0.95",
            "--config.optim.warmup_steps=4",
        ],
        ["config.optim.decay_fraction = 0.95", "step 1", "config.optim.warmup_steps = 4"],
    ),
    "xz of nothing": (
        ["--config.eval.compare_xz=true", "--config.data.eval_fraction=0"],
        ["config.eval.compare_xz = True", "config.data.eval_fraction is 0"],
    ),
    "unknown best metric": (
        ["--config.checkpoint.best_metric=train/loss"],
        ["config.checkpoint.best_metric", "eval/loss"],
    ),
    "seed beyond 32 bits": (
        ["--config.seed=4294967296"],
        ["config.seed = 4294967296", "4294967295"],
    ),
    "bpe too large": (
        ["--config.data.tokenizer=bpe:99999999999999999999"],
        ["config.data.tokenizer", "10,000,000"],
    ),
    "batch too large": (
        ["--config.train.batch_size=2000000000"],
        ["config.train.batch_size = 2000000000", "more text"],
    ),
    "text for a tuple": (
        ["--config.model.pattern=foo"],
        ["config.model.pattern = 'foo'", "such as (a, b)"],
    ),
    "kernel that cannot run here": (
        ["--config.compute.kernel=cudnn"],
        ["config.compute.kernel", "cudnn"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(folder, tmp_path, name):
    overrides, words = CONFIGS[name]
    refused(2, words, *runs.arguments(folder, tmp_path / "run", *overrides))
    assert not (tmp_path / "run/config.json").exists()  # refused before the run began
