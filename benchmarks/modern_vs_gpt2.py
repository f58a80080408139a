"""The `modern` recipe against GPT-2's, at equal FLOPs and equal steps, on given texts.

    .venv/bin/python benchmarks/modern_vs_gpt2.py --text shakespeare=input.txt:char chinese=book.txt:bpe:4096

Both models are 4 layers of 128 with 4 heads and a feed-forward of 512 on rows of 128 tokens, 16 a
step, 400 steps; the FLOPs of a token are equal within 1 % (modern pads the head to 128 rows; value
embeddings are looked up). GPT-2: learned positions, LayerNorm, GELU, tied head, AdamW at three peak
rates, cosine. Modern: the settings of configs/quickstart.py. Held out: the last tenth of the text,
all of it. Three seeds each. Writes modern_vs_gpt2.json next to this file.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from gpt_jax.commands import config_file, runtime
from gpt_jax.model.count import count_params
from gpt_jax.run import loop, notes, parts as run_parts

HERE = Path(__file__).resolve().parent
SEEDS = 3
SHAPE = [
    "model.layers=4",
    "model.embed=128",
    "model.heads=4",
    "train.seq_len=128",
    "train.batch_size=16",
    "train.steps=400",
    "data.packing=window",
    "data.split=tail",
    "data.eval_fraction=0.1",
    "eval.every_steps=0",
    "eval.batches=0",
    "eval.sample_every_steps=0",
    "eval.compare_xz=false",
    "checkpoint.every_steps=0",
    "log.tensorboard=false",
    "compute.unroll=0",
]
RUNS = {
    "gpt2 1e-3": (
        "gpt2.py",
        ["compute.dtype=float32", "optim.learning_rate=1e-3", "optim.b2=0.99", "model.vocab=0"],
    ),
    "gpt2 3e-3": (
        "gpt2.py",
        ["compute.dtype=float32", "optim.learning_rate=3e-3", "optim.b2=0.99", "model.vocab=0"],
    ),
    "gpt2 1e-2": (
        "gpt2.py",
        ["compute.dtype=float32", "optim.learning_rate=1e-2", "optim.b2=0.99", "model.vocab=0"],
    ),
    "modern": ("quickstart.py", []),
}
GPT2_SCHEDULE = [
    "optim.warmup_steps=40",
    "model.max_seq=0",
    "train.accumulate=1",
    "eval.batch_size=0",
    "train.loss_chunk=0",
    "mesh.fsdp=1",
    "mesh.data=-1",
    "compute.remat=none",
]


def run(config: str, overrides: list[str], workdir: str) -> dict:
    """Held-out loss and bits per byte after the last step."""
    parts = run_parts.build(
        config_file.load_config(
            str(HERE.parent / "configs" / config), [f"--config.{text}" for text in overrides]
        )
    )
    summary = loop.run_training(parts, Path(workdir))
    return {
        "loss": summary.eval_loss,
        "bits_per_byte": summary.bits_per_byte,
        "parameters": summary.parameters,
        "flops_per_token": notes.token_flops(
            parts.config, count_params(parts.config.model)["matmul"]
        )[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE:TOKENIZER")
    args = parser.parse_args()
    runtime.keep_memory()
    found = {}
    for spec in args.text:
        name, _, rest = spec.partition("=")
        file, _, tokenizer = rest.partition(":")
        found[name] = {}
        for title, (config, own) in RUNS.items():
            schedule = GPT2_SCHEDULE if config == "gpt2.py" else []
            seeds = []
            for seed in range(SEEDS):
                with tempfile.TemporaryDirectory() as workdir:
                    seeds.append(
                        run(
                            config,
                            [
                                *SHAPE,
                                *schedule,
                                *own,
                                f"seed={seed}",
                                f"data.path={file}",
                                f"data.tokenizer={tokenizer}",
                            ],
                            workdir,
                        )
                    )
            losses = [one["loss"] for one in seeds]
            mean = {
                key: statistics.mean(one[key] for one in seeds) for key in ("loss", "bits_per_byte")
            }
            found[name][title] = {**seeds[0], **mean, "lowest": min(losses), "highest": max(losses)}
            print(name, title, json.dumps(found[name][title]), flush=True)
    (HERE / "modern_vs_gpt2.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
