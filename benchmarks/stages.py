"""One model in three runs: pretrained, annealed on another mixture, and given a longer context.

    python benchmarks/stages.py            # about five minutes on two CPU cores

Each run starts from the weights of the one before (`config.init.from`), with its own schedule:

1. pretraining on Python's standard library, rows of 128 bytes, a constant rate after the warmup;
2. annealing on a mixture of that code and this repository's pages, the rate falling to a tenth;
3. rows of 512 bytes with a larger base of the rotary positions, a few steps at a low rate.

After each run its checkpoint is measured on code and pages that no run has seen. It writes
stages.json beside this file, and pictures/stages.png.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HELDOUT = 12  # one file of so many
MODEL = ("--config.model.layers=4", "--config.model.embed=128", "--config.model.position=rotary")
STAGES = (
    (
        "pretrained",
        ("--config.train.steps=400", "--config.train.seq_len=128", "--config.train.batch_size=16"),
        ("--config.optim.schedule=constant", "--config.optim.learning_rate=2e-3"),
        ("code",),
    ),
    (
        "annealed on another mixture",
        ("--config.train.steps=200", "--config.train.seq_len=128", "--config.train.batch_size=16"),
        ("--config.optim.schedule=linear", "--config.optim.learning_rate=1e-3"),
        ("code", "pages"),
    ),
    (
        "four times the context",
        ("--config.train.steps=60", "--config.train.seq_len=512", "--config.train.batch_size=8"),
        ("--config.optim.learning_rate=5e-4", "--config.model.rope_base=80000"),
        ("code", "pages"),
    ),
)


def call(*words: str) -> str:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", *words], capture_output=True, text=True, env=environ
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def split_files(name: str, files: list[Path], folder: Path) -> None:
    """Writes `folder`/`name`.txt to train on, and `name`.heldout.txt of whole other files."""
    sides: dict[str, list[str]] = {"txt": [], "heldout.txt": []}
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = file.read_text(encoding="utf-8")
            digest = hashlib.sha256(file.name.encode()).digest()
            sides["heldout.txt" if digest[0] % HELDOUT == 0 else "txt"].append(text)
    for side, texts in sides.items():
        (folder / f"{name}.{side}").write_text("\n".join(texts), encoding="utf-8")


def train(folder: Path, number: int) -> tuple[dict[int, float], dict[str, float]]:
    """Runs a stage. Returns its training curve, and bits a byte of the held-out texts after it."""
    _, sizes, schedule, sources = STAGES[number]
    workdir = folder / f"stage{number}"
    flags = [*MODEL, *sizes, *schedule, "--config.eval.samples=0", "--config.eval.every_steps=0"]
    if len(sources) == 1:
        flags.append(f"--config.data.path={folder / sources[0]}.txt")
    else:
        rows = tuple((name, f"{folder / name}.txt", 1.0) for name in sources)
        flags.append(f"--config.data.sources={rows!r}")
    if number:
        flags.append(f"--config.init.from={folder / f'stage{number - 1}'}")
    config = f"--config={ROOT / 'configs/tiny.py'}"
    call("train", config, f"--workdir={workdir}", f"--config.data.cache={folder}/cache", *flags)

    texts = [f"{folder / name}.heldout.txt" for name in ("code", "pages")]
    words = ("evaluate", f"--checkpoint={workdir}", "--batch_size=32", "--json", "--text")
    rows = json.loads(call(*words, *texts))["sources"]
    losses = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/bits_per_byte" in row:
            losses[row["step"]] = row["train/bits_per_byte"]
    return losses, {
        name: rows[text]["bits_per_byte"]
        for name, text in zip(("code", "pages"), texts, strict=True)
    }


def draw(curves: list[dict[int, float]], measured: list[dict[str, float]]) -> bytes:
    """A picture of the three curves in a row, with what was measured after each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    begin = 0
    ends = []
    for (name, *_), curve in zip(STAGES, curves, strict=True):
        axes.plot([begin + step for step in curve], list(curve.values()), linewidth=0.8, label=name)
        begin += max(curve)
        ends.append(begin)
    for name, marker in (("code", "o"), ("pages", "s")):
        values = [bits[name] for bits in measured]
        axes.plot(ends, values, marker, color="#1f2933", label=f"held-out {name}")
        for end, value in zip(ends, values, strict=True):
            axes.annotate(f"{value:.2f}", (end, value), (-6, 6), textcoords="offset points")
    axes.set_xlabel("steps of all three runs")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(top=5)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        library = Path(sysconfig.get_path("stdlib"))
        split_files("code", sorted(library.glob("*.py")), folder)
        split_files("pages", sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]), folder)
        stages = [train(folder, number) for number in range(len(STAGES))]

    curves = [curve for curve, _ in stages]
    measured = [bits for _, bits in stages]
    (HERE / "pictures/stages.png").write_bytes(draw(curves, measured))
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - began),
        "heldout_bits_per_byte": {
            name: bits for (name, *_), bits in zip(STAGES, measured, strict=True)
        },
    }
    (HERE / "stages.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
