"""Log-likelihoods on this machine's CPU: ours beside HFLM of lm-evaluation-harness.

    python3 -m venv reference
    reference/bin/pip install torch transformers "lm_eval[hf]"
    python benchmarks/harness.py --reference=reference/bin/python

A model in the shape of Llama, hardly trained, and its copy for `transformers` score the same
requests. These are made of Python's standard library: questions of four choices after five
examples, drawn for each question or the same for all, and texts whose last words are asked for.
Both processes are asked in turn. The first pass of each has what is paid once, such as compiling.
The ratio is HFLM's time over ours, pass by pass; above 1 we are faster. Tokens are those of each
request's context and continuation, shared or not. With `--record` it writes harness.json beside
this file.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VOCAB = 4096  # Of the tokenizer and of the head, whose share of the time it decides.
SHAPE = dict(layers=4, embed=512, heads=8, kv_heads=4, mlp=1408, max_seq=1024, vocab=VOCAB)
ONE_STEP = {"train.steps": 1, "train.batch_size": 2, "optim.warmup_steps": 0}
QUESTIONS = 12
EXAMPLES = 5
TEXTS = 60


def read_passages() -> list[str]:
    """Passages of 200 characters, in an order of their own."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text() for name in ("argparse.py", "typing.py", "ast.py"))
    passages = [text[at : at + 200] for at in range(0, len(text) - 200, 200)]
    random.Random(0).shuffle(passages)
    return passages


def make_requests(passages: list[str]) -> dict[str, list[tuple[str, str]]]:
    """(context, continuation) by the name of the kind."""
    draw = random.Random(1)

    def ask(examples):
        context = "\n\n".join([*examples, draw.choice(passages)])
        return [(context, " " + draw.choice(passages)[:30]) for _ in range(4)]

    choices = []
    for _ in range(QUESTIONS):
        choices += ask(draw.sample(passages, EXAMPLES))

    fixed = draw.sample(passages, EXAMPLES)
    same = [pair for _ in range(QUESTIONS) for pair in ask(fixed)]

    last_words = []
    for passage in passages[:TEXTS]:
        context, _, word = passage.rstrip().rpartition(" ")
        last_words.append((context.rstrip() or "def", " " + word))
    return {
        "four choices after five examples": choices,
        "four choices after the same five examples": same,
        "last words": last_words,
    }


def run(*words: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpt_jax", *words]
    subprocess.run(command, check=True, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)


def make_models(folder: Path, shape: dict = SHAPE, training: dict = ONE_STEP) -> tuple[Path, Path]:
    """(checkpoint, directory for transformers) of one model, trained as `training` says."""
    run(
        "train",
        "--config=configs/llama.py:1b",
        f"--workdir={folder / 'run'}",
        *(f"--config.model.{name}={value}" for name, value in shape.items()),
        *(f"--config.{name}={value}" for name, value in training.items()),
        "--config.model.rope_scale_factor=1",
        "--config.data.path=stdlib",
        f"--config.data.tokenizer=bpe:{VOCAB}",
        f"--config.data.cache={folder / 'cache'}",
        "--config.train.seq_len=256",
        "--config.train.accumulate=1",
        "--config.train.loss_chunk=0",
        "--config.eval.batches=1",
        "--config.eval.samples=0",
        "--config.compute.dtype=float32",
    )
    run("convert", f"--from={folder / 'run'}", f"--to={folder / 'hf'}", "--format=hf")
    return folder / "run", folder / "hf"


class Worker:
    """One of the two processes."""

    def __init__(self, python: str, kind: str, path: Path):
        environ = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.kind = kind
        self.process = subprocess.Popen(
            [python, str(HERE / "harness_worker.py"), kind, str(path)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
        )

    def ask(self, **question) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"{self.kind}: the process ended without an answer; its error is above"
            )
        return json.loads(answer)


def compare(workers: dict[str, Worker], file: Path, rounds: int) -> dict:
    """Asks both in turn."""
    passes: dict[str, list[dict]] = {kind: [] for kind in workers}
    for _ in range(rounds):
        for kind, worker in workers.items():
            passes[kind].append(worker.ask(file=str(file)))

    ours, theirs = passes["ours"], passes["hflm"]
    pairs = list(zip(ours[0]["scores"], theirs[0]["scores"], strict=True))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "first seconds": {kind: found[0]["seconds"] for kind, found in passes.items()},
        "seconds": {
            kind: statistics.median(one["seconds"] for one in found[1:])
            for kind, found in passes.items()
        },
        "ratio": statistics.median(ratios),
        "ratio lowest and highest": [min(ratios), max(ratios)],
        "largest difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy alike": all(a[1] == b[1] for a, b in pairs),
    }


def count_tokens(path: Path, requests: list[tuple[str, str]]) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return sum(len(tokenizer.encode(a + b).ids) for a, b in requests)


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--reference", required=True, help="a Python with torch and lm_eval")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--kind", default="", help="only the requests of this name")
    flags.add_argument("--record", action="store_true")
    args = flags.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, directory = make_models(folder)
        workers = {
            "ours": Worker(sys.executable, "ours", checkpoint),
            "hflm": Worker(args.reference, "hflm", directory),
        }
        for kind, requests in make_requests(read_passages()).items():
            if args.kind not in ("", kind):
                continue
            file = folder / "requests.json"
            file.write_text(json.dumps(requests))
            found = compare(workers, file, args.rounds)
            facts = {
                "date": datetime.date.today().isoformat(),
                "load": os.getloadavg()[2],
                "rounds": args.rounds,
                "requests": len(requests),
                "tokens": count_tokens(directory, requests),
            }
            results[kind] = facts | found
            print(kind, json.dumps(results[kind], indent=1), flush=True)
        for worker in workers.values():
            worker.process.kill()

    if args.record:
        path = HERE / "harness.json"
        known = json.loads(path.read_text())["kinds"] if args.kind else {}
        made = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "shape": SHAPE,
            "kinds": known | results,
        }
        path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
