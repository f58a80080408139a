"""A mixture from end to end: three sources prepared together, trained, killed, and continued
by another number of processes.

    python benchmarks/mixture.py --novels DIR --history FILE --talk DIR --out runs/mixture_example

`--novels`: a folder of text files (.xz too), `--history`: a text file, `--talk`: folders of
chatterbot-corpus .yml files. Any other files of those kinds will do. They are written as JSON lines
first, novels and history cut into documents of some lines, so that some of each source can be held
out. Then what runs is what a person would type: `gpt-jax prepare`, and `gpt-jax train
--config=configs/mixture.py:…` three times:

    whole     one process, never stopped
    same      one process, killed with SIGKILL at a third of the run, the same command again
    other     two processes, killed likewise, continued by one

Losses of `same` must be those of `whole` to the bit. Those of `other` differ by rounding, since
sums over two processes are added in another order, and training spreads that: the table gives the
difference over the first ten steps and over all. Prints tables and writes `mixture.json` beside
this file.
"""

import argparse
import json
import lzma
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
SOURCES = ("gutenberg", "zizhitongjian", "chatterbot")


def read(path: Path) -> str:
    raw = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def cut(path: Path, lines: int) -> list[str]:
    """Documents of `lines` lines."""
    text = read(path).splitlines(keepends=True)
    return ["".join(text[i : i + lines]) for i in range(0, len(text), lines)]


def write(path: Path, documents: list[str]) -> None:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    )


def conversations(folders: list[str]) -> list[str]:
    """Those of chatterbot-corpus files, a turn a line."""
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.yml"))]
    return [
        "\n".join(map(str, turns)) + "\n"
        for file in files
        for turns in yaml.safe_load(file.read_text())["conversations"]
    ]


def start(*given, log: Path) -> subprocess.Popen:
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "gpt_jax", *map(str, given)],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.wait():
            raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}")


def train(workdir: Path, data: Path, steps: int, processes: int, kill_at: int = 0) -> None:
    """The train command in `processes` processes; killed once step `kill_at` is logged, if that
    is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [
        "train",
        f"--config=configs/mixture.py:{data}",
        f"--workdir={workdir}",
        f"--config.train.steps={steps}",
        "--config.log.every_steps=1",
        f"--config.eval.every_steps={steps // 2}",
        "--config.log.progress=false",
        f"--config.checkpoint.every_steps={steps // 6}",
        "--config.optim.muon_momentum_warmup=20",
        "--config.optim.warmup_steps=5",
        "--config.data.block=40",  # so that a run this short has its second stage
        "--config.eval.batches=8",
        f"--config.data.phases=(({steps * 2048 // 2},(0.4,0.45,0.15)),)",
    ]
    own = (
        [[]]
        if processes == 1
        else [
            [
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={processes}",
                f"--process_id={i}",
                "--cpu_devices=1",
            ]
            for i in range(processes)
        ]
    )
    running = [
        start(*given, *more, log=workdir.with_suffix(f".{i}.log")) for i, more in enumerate(own)
    ]
    while kill_at:
        if any(process.poll() is not None for process in running):
            raise SystemExit(f"ended before step {kill_at}, see {workdir.with_suffix('.0.log')}")
        if max(losses(workdir), default=0) >= kill_at:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return
        time.sleep(0.05)
    finish(running)


def losses(workdir: Path, key: str = "train/loss") -> dict[int, float]:
    """{step: value} so far."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--novels", required=True)
    flags.add_argument("--history", required=True)
    flags.add_argument("--talk", required=True, nargs="+")
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=STEPS)
    args = flags.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    out = args.out.resolve()
    write(
        out / "gutenberg.jsonl",
        [text for file in sorted(Path(args.novels).iterdir()) for text in cut(file, 200)],
    )
    write(out / "zizhitongjian.jsonl", cut(Path(args.history), 50))
    write(out / "chatterbot.jsonl", conversations(args.talk))
    began = time.perf_counter()
    finish(
        [
            start(
                "prepare",
                "--input",
                *(f"{name}={out / name}.jsonl" for name in SOURCES),
                "--tokenizer=bpe:4096",
                "--eval_fraction=0.05",
                f"--output={out / 'data'}",
                log=out / "prepare.log",
            )
        ]
    )
    prepared = time.perf_counter() - began
    print((out / "prepare.log").read_text())
    train(out / "whole", out / "data", args.steps, 1)
    for name, before, after in (("same", 1, 1), ("other", 2, 1)):
        train(out / name, out / "data", args.steps, before, kill_at=args.steps // 3 + 2)
        train(out / name, out / "data", args.steps, after)
    whole = losses(out / "whole")
    difference = {}
    for name in ("same", "other"):
        found = losses(out / name)
        apart = [abs(found[step] - whole[step]) / whole[step] for step in whole]
        difference[name] = {"first 10 steps": max(apart[:10]), "all steps": max(apart)}
    names = ("", *(f"{name}/" for name in SOURCES))
    evals = {
        key: losses(out / "whole", key)[args.steps]
        for key in [
            f"eval/{name}{metric}" for name in names for metric in ("loss", "bits_per_byte")
        ]
    }
    found = {
        "steps": args.steps,
        "prepare_seconds": round(prepared, 1),
        "largest relative loss difference": difference,
        "heldout": evals,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print("largest relative difference of a training loss from the run that was never stopped\n")
    print("| run | first 10 steps | all steps |\n|---|---|---|")
    for name, row in difference.items():
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in row.values())} |")
    print("\n| held-out | loss | bits per byte |\n|---|---|---|")
    for name in names:
        print(
            f"| {name.strip('/') or 'weighted mean'} | {evals[f'eval/{name}loss']:.3f} | "
            f"{evals[f'eval/{name}bits_per_byte']:.3f} |"
        )


if __name__ == "__main__":
    main()
