"""One config on one device, on eight fake ones, over four processes and under SLURM: one curve.

    ./launch/slurm_test.sh -- .venv/bin/python benchmarks/scale_out.py      beside a SLURM of two nodes (root)
    python benchmarks/scale_out.py                                          without one

Every run is the `gpt-jax train` command with another mesh. Where `sbatch` leads to a SLURM, the
last run is a job of two tasks that is put back into the queue on its way. The curves' differences
go to scale_out.json, the picture to pictures/scale_out.png. float32 on a CPU.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = 200
TRAIN = [
    "train",
    f"--config={HERE.parent / 'configs/tiny.py'}",
    "--config.data.path=stdlib",
    "--config.model.layers=4",
    f"--config.train.steps={STEPS}",
    "--config.train.seq_len=64",
    "--config.eval.every_steps=0",
    "--config.eval.batches=4",
    "--config.log.every_steps=1",
    "--config.log.progress=false",
    # Adam's usual eps of 1e-8 makes steps of the rate's size out of rounding noise, and curves part
    # after 20 steps.
    "--config.optim.eps=1e-6",
    "--config.optim.learning_rate=2e-3",
]
RUNS = {  # name: (processes, devices of each, mesh)
    "1 device": (1, 1, {}),
    "8 devices: pipeline 2 x fsdp 2 x tensor 2": (1, 8, {"pipeline": 2, "fsdp": 2, "tensor": 2}),
    "8 devices: context 2 x expert 2 x tensor 2": (1, 8, {"context": 2, "expert": 2, "tensor": 2}),
    "4 processes x 2 devices: pipeline 2 x data 2 x context 2": (
        4,
        2,
        {"pipeline": 2, "data": 2, "context": 2},
    ),
}
BY_SLURM = (
    "SLURM, 2 tasks x 2 devices, requeued: fsdp 2 x tensor 2",
    (2, 2, {"fsdp": 2, "tensor": 2}),
)


def command(launcher: list[str], workdir: Path, mesh: dict[str, int]) -> list[str]:
    axes = [f"--config.mesh.{axis}={size}" for axis, size in ({"data": 1} | mesh).items()]
    return [sys.executable, "-m", "gpt_jax", *launcher, *TRAIN, f"--workdir={workdir}", *axes]


def train(workdir: Path, processes: int, devices: int, mesh: dict[str, int]) -> None:
    """One run, all processes of it; raises CalledProcessError."""
    launcher = ["launch", "local", f"--processes={processes}", f"--devices_per_process={devices}"]
    subprocess.run(command(launcher, workdir, mesh), check=True, stdout=subprocess.DEVNULL)


def train_by_slurm(workdir: Path, tasks: int, devices: int, mesh: dict[str, int]) -> None:
    """The same as a job, requeued after a quarter of its steps; raises CalledProcessError, and
    SystemExit where it does not end well."""
    launcher = [
        "launch",
        "slurm",
        f"--nodes={tasks}",
        "--tasks_per_node=1",
        "--time=600",
        f"--logs={workdir}-logs",
        "--",
    ]
    words = [*command(launcher, workdir, mesh), f"--cpu_devices={devices}"]
    job = (
        subprocess.run(words, check=True, capture_output=True, text=True)
        .stdout.split()[2]
        .rstrip(";")
    )
    show = ["scontrol", "show", "job", job]

    def state():
        return (
            subprocess.run(show, check=True, capture_output=True, text=True)
            .stdout.split("JobState=")[1]
            .split()[0]
        )

    log = workdir / "metrics.jsonl"
    while state() in ("PENDING", "RUNNING") and not (
        log.exists() and log.read_text().count("\n") > STEPS // 4
    ):
        time.sleep(1)
    subprocess.run(["scontrol", "requeue", job], check=True)
    while (now := state()) != "COMPLETED":
        if now not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            raise SystemExit(f"the SLURM job ended as {now}; its output is in {workdir}-logs")
        time.sleep(1)


def losses(workdir: Path) -> list[float]:
    """The training loss of every step."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves over each other, and below each one's distance from the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    first, *others = curves.items()
    for width, (name, values) in zip((7, 5, 3.4, 2, 1), curves.items(), strict=False):
        top.plot(range(1, len(values) + 1), values, linewidth=width, label=name)
    for i, (_, values) in enumerate(others, 1):
        bottom.semilogy(
            range(1, len(values) + 1),
            [max(abs(a / b - 1), 1e-9) for a, b in zip(values, first[1], strict=False)],
            color=f"C{i}",
            linewidth=1,
        )
    top.set_ylabel("training loss, nats a token")
    bottom.set(xlabel="step", ylabel=f"relative to\n{first[0]}")
    top.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = {}
        for i, (name, run) in enumerate(RUNS.items()):
            train(Path(folder) / str(i), *run)
            curves[name] = losses(Path(folder) / str(i))
        if shutil.which("sbatch"):
            name, run = BY_SLURM
            train_by_slurm(Path(folder) / "slurm", *run)
            curves[name] = losses(Path(folder) / "slurm")
    first = next(iter(curves.values()))
    rows = {
        name: {
            "last loss": values[-1],
            "largest relative difference": max(
                abs(a / b - 1) for a, b in zip(values, first, strict=True)
            ),
        }
        for name, values in curves.items()
    }
    (HERE / "scale_out.json").write_text(
        json.dumps({"steps": STEPS, "runs": rows}, indent=1) + "\n"
    )
    draw(curves, HERE / "pictures/scale_out.png")
    for name, row in rows.items():
        print(f"{row['last loss']:.6f}  {row['largest relative difference']:.1e}  {name}")


if __name__ == "__main__":
    main()
