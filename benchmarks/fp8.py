"""One model trained twice on the same batches: matmuls of blocks in bfloat16, and in fp8.

    nice -n 5 python benchmarks/fp8.py            # minutes on two CPU cores

The text is Python's standard library, as in the quickstart. Both runs draw the same first weights
and the same batches. `compute.matmul_dtype` is all that differs. XLA emulates fp8 on a CPU, so the
losses mean something and the times do not. It writes fp8.json beside this file, and
pictures/fp8.png.
"""

import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = {"bfloat16": "compute", "fp8": "fp8"}  # name -> compute.matmul_dtype
FLAGS = (
    f"--config={ROOT / 'configs/tiny.py'}",
    "--config.data.path=stdlib",
    "--config.compute.dtype=bfloat16",
    "--config.model.layers=4",
    "--config.model.embed=128",
    "--config.model.position=rotary",
    "--config.optim.learning_rate=2e-3",
    "--config.optim.warmup_steps=20",
    "--config.train.steps=300",
    "--config.train.seq_len=128",
    "--config.train.batch_size=16",
    "--config.eval.every_steps=100",
    "--config.eval.batches=32",
    "--config.eval.samples=0",
    "--config.checkpoint.every_steps=0",
)


def train(folder: Path, name: str) -> tuple[list[dict], float]:
    """Trains one of RUNS. Returns the rows of its metrics, and its seconds."""
    workdir = folder / name
    given = [*FLAGS, f"--config.compute.matmul_dtype={RUNS[name]}"]
    given += [f"--workdir={workdir}", f"--config.data.cache={folder / 'cache'}"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", "train", *given],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], round(time.monotonic() - began, 1)


def read_curve(rows: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if key in row}


def draw(curves: dict[str, dict[str, dict[int, float]]]) -> bytes:
    """A picture of both training curves, and of how far they are apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        steps = curve["train/loss"]
        left.plot([*steps], [*steps.values()], linewidth=0.8, label=f"{name}, training")
        steps = curve["eval/loss"]
        left.plot([*steps], [*steps.values()], "o", label=f"{name}, held out")
    left.set_xlabel("step")
    left.set_ylabel("loss, nats a byte")
    left.legend(frameon=False)

    wide, narrow = (curves[name]["train/loss"] for name in RUNS)
    right.plot([*wide], [narrow[step] - wide[step] for step in wide], linewidth=0.8)
    right.axhline(0, color="#1f2933", linewidth=0.5)
    right.set_xlabel("step")
    right.set_ylabel("training loss, fp8 less bfloat16")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def main() -> None:
    curves = {}
    seconds = {}
    with tempfile.TemporaryDirectory() as text:
        for name in RUNS:
            rows, seconds[name] = train(Path(text), name)
            curves[name] = {key: read_curve(rows, key) for key in ("train/loss", "eval/loss")}

    (HERE / "pictures/fp8.png").write_bytes(draw(curves))
    wide, narrow = (curves[name]["train/loss"] for name in RUNS)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "flags": list(FLAGS[1:]),
        "seconds": seconds,
        "heldout_loss": {name: curve["eval/loss"] for name, curve in curves.items()},
        "largest_training_difference": max(abs(narrow[step] - wide[step]) for step in wide),
    }
    (HERE / "fp8.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
