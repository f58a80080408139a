"""gpt_jax against nanoGPT in PyTorch on this machine's CPU: the same losses, and the time of a
step.

    git clone https://github.com/karpathy/nanoGPT            # any folder
    .venv/bin/python benchmarks/nanogpt.py --nanogpt=nanoGPT --torch_python=PYTHON_WITH_TORCH [--text=input.txt]

Losses: both start from nanoGPT's initial weights and take 50 steps on the same batches (warmup,
cosine, clipping, decay as in config/train_shakespeare_char.py with its CPU settings; the larger
model takes 10). Time: the two run in turn, a few steps each, many times over; the ratio is taken
pair by pair. Torch runs eagerly, as fast as compiled on CPU. Held-out loss: with --text, nanoGPT's
smaller model trained for its 2,000 steps with three seeds, over the whole held-out text and as
nanoGPT estimates it, for configs/shakespeare_char.py:cpu to be compared with. Writes nanogpt.json
next to this file.
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import config as configs
from gpt_jax.commands import config_file, runtime
from gpt_jax.model import describe_parameter
from gpt_jax.run import agreement, parts as run_parts
from gpt_jax.sharding import mesh
from gpt_jax.train.optim.optimizer import make_optimizer
from gpt_jax.train.optim.schedule import make_schedule
from gpt_jax.train.step import init_state, train_step

HERE = Path(__file__).resolve().parent
SIZES = {
    "small": dict(layers=4, embed=128, heads=4, block=64, batch=12, steps=20, losses=50),
    "large": dict(layers=6, embed=384, heads=6, block=256, batch=8, steps=2, losses=10),
}


class Torch:
    """The worker process."""

    def __init__(self, python: str, clone: str, size: dict, seed: int = 0):
        shape = [str(size[k]) for k in ("layers", "embed", "heads", "block", "batch")]
        self.process = subprocess.Popen(
            [python, str(HERE / "nanogpt_worker.py"), clone, *shape, str(seed)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **command):
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def our_params(state: dict, layers: int) -> dict:
    """nanoGPT's state dict as our parameters: torch keeps (out, in), its q, k and v in one
    matrix."""

    def stack(name):
        return jnp.asarray(
            np.stack([state[f"transformer.h.{i}.{name}.weight"] for i in range(layers)])
        )

    def kernel(name):
        return jnp.swapaxes(stack(name), 1, 2)

    q, k, v = jnp.split(kernel("attn.c_attn"), 3, axis=2)
    attention = {
        "q": {"kernel": q},
        "k": {"kernel": k},
        "v": {"kernel": v},
        "out": {"kernel": kernel("attn.c_proj")},
    }
    block = {
        "mixer_norm": {"scale": stack("ln_1")},
        "mlp_norm": {"scale": stack("ln_2")},
        "attention": attention,
        "mlp": {"up": {"kernel": kernel("mlp.c_fc")}, "down": {"kernel": kernel("mlp.c_proj")}},
    }

    def table(name):
        return {"table": jnp.asarray(state[f"transformer.{name}.weight"])}

    return {
        "embed": table("wte"),
        "position": table("wpe"),
        "blocks": {"0": block},
        "final_norm": {"scale": jnp.asarray(state["transformer.ln_f.weight"])},
    }


def make_ours(size: dict, weights: dict):
    """(state, jitted step, resolved config) with nanoGPT's weights and settings."""
    config = config_file.load_config(
        str(HERE.parent / "configs/shakespeare_char.py"),
        [f"--config.model.{k}={size[k]}" for k in ("layers", "embed", "heads")]
        + [f"--config.train.seq_len={size['block']}", f"--config.train.batch_size={size['batch']}"],
    )
    config = configs.resolve(config, 65)
    model = config.model
    kernel, _ = agreement.choose_run_kernel(
        model, config.compute, size["block"], False, mesh.make_mesh({})
    )
    compute = replace(config.compute, kernel=kernel)
    params = our_params(weights, size["layers"])
    tx = make_optimizer(config.optim, params, describe_parameter)
    state = jax.jit(lambda p: init_state(p, tx, config.train))(params)
    network = run_parts.make_network(model, compute)
    step = jax.jit(
        lambda state, batch: train_step(
            state, {}, batch, jax.random.key(0), network=network, tx=tx, train=config.train
        ),
        donate_argnums=0,
    )
    return state, step, config


def columns(tokens, targets) -> dict:
    return {
        "tokens": tokens,
        "targets": targets,
        "weight": np.ones(tokens.shape, np.float32),
        "bytes": np.ones(tokens.shape, np.int32),
    }


def read_characters(file: str) -> np.ndarray:
    """The text as ids of its characters in sorted order, nanoGPT's tokenizer."""
    characters = Path(file).read_text()
    index = {c: i for i, c in enumerate(sorted(set(characters)))}
    return np.array([index[c] for c in characters], np.int32)


def compare_losses(torch: Torch, size: dict, weights: dict, text: str | None) -> dict:
    """Largest difference of the loss over the first steps on the same batches."""
    steps = size["losses"]
    rng = np.random.default_rng(0)
    if text:
        ids = read_characters(text)
    else:
        ids = rng.integers(0, 65, 100_000).astype(np.int32)
    starts = rng.integers(0, len(ids) - size["block"] - 1, (steps, size["batch"]))
    rows = ids[starts[..., None] + np.arange(size["block"] + 1)]
    state, step, config = make_ours(size, weights)
    schedule = make_schedule(config.optim)
    rates = np.array([config.optim.learning_rate * float(schedule(i)) for i in range(steps)])
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/batches.npz", tokens=rows[..., :-1], targets=rows[..., 1:], rates=rates)
        theirs = torch.ask(do="losses", file=f"{folder}/batches.npz")
    ours = []
    for row in rows:
        state, sums = step(state, columns(row[:, :-1], row[:, 1:]))
        ours.append(float(sums["loss"][0] / sums["loss"][1]))
    return {
        "steps": steps,
        "text": "given" if text else "random",
        "first": ours[0],
        "last": ours[-1],
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=False)),
    }


def compare_time(torch: Torch, size: dict, weights: dict, rounds: int) -> dict:
    """Medians of the time of a step in turn, and of the ratio torch / ours pair by pair (above
    1: ours is faster)."""
    state, step, _ = make_ours(size, weights)
    tokens = (
        np.random.default_rng(0).integers(0, 65, (size["batch"], size["block"])).astype(np.int32)
    )
    batch = jax.device_put(columns(tokens, tokens))
    for _ in range(3):
        state, sums = step(state, batch)
    jax.block_until_ready(sums)
    torch.ask(do="time", steps=3)
    pairs = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(size["steps"]):
            state, sums = step(state, batch)
        jax.block_until_ready(sums)
        pairs.append(
            (
                (time.perf_counter() - began) / size["steps"],
                torch.ask(do="time", steps=size["steps"]),
            )
        )
    ratios = [theirs / ours for ours, theirs in pairs]
    ours_ms, torch_ms = (1e3 * statistics.median(column) for column in zip(*pairs, strict=False))
    return {
        "ours_ms": ours_ms,
        "torch_ms": torch_ms,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": rounds,
    }


def train_theirs(python: str, clone: str, text: str) -> list[dict]:
    """nanoGPT's held-out losses after its own training, one entry a seed."""
    found = []
    for seed in range(3):
        torch = Torch(python, clone, SIZES["small"], seed)
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/text.npz", tokens=read_characters(text))
            found.append(torch.ask(do="heldout", file=f"{folder}/text.npz", steps=2000))
        torch.process.terminate()
        print("nanoGPT's held-out loss", json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", required=True, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--torch_python", required=True, help="a Python that can import torch")
    parser.add_argument(
        "--text", help="tinyshakespeare; without it the losses are on random characters"
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    runtime.keep_memory()
    found = {
        "machine": f"{platform.machine()}, {jax.device_count()} jax device, jax {jax.__version__}"
    }
    for name, size in SIZES.items():
        torch = Torch(args.torch_python, args.nanogpt, size)
        with tempfile.TemporaryDirectory() as folder:
            found["torch"] = torch.ask(do="weights", file=f"{folder}/weights.npz")
            weights = dict(np.load(f"{folder}/weights.npz"))
        found[name] = {
            "loss": compare_losses(torch, size, weights, args.text),
            "time": compare_time(torch, size, weights, args.rounds),
        }
        torch.process.terminate()
        print(name, json.dumps(found[name], indent=1), flush=True)
    if args.text:
        found["heldout"] = train_theirs(args.torch_python, args.nanogpt, args.text)
    (HERE / "nanogpt.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
