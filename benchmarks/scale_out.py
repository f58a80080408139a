"""One config on one device, on eight fake ones, over four processes, and wherever else it was trained: one curve.

    python benchmarks/scale_out.py [--add=SLURM=runs/slurm ...]

Every run is the `gpt-jax train` command with another mesh; the curves and their differences go to scale_out.json, the
picture to pictures/scale_out.png. `--add` takes a workdir in which `TRAIN` below was trained by other means, such as
launch/slurm_test.sh leaves one. float32 on a CPU.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAIN = ["train", f"--config={HERE.parent / 'configs/tiny.py'}", "--config.data.path=stdlib", "--config.model.layers=4",
         "--config.train.steps=200", "--config.train.seq_len=64", "--config.eval.every_steps=0", "--config.eval.batches=4",
         "--config.log.progress=false"]
RUNS = {  # name: (processes, devices of each, mesh)
    "1 device": (1, 1, {}),
    "8 devices: pipeline 2 x fsdp 2 x tensor 2": (1, 8, {"pipeline": 2, "fsdp": 2, "tensor": 2}),
    "8 devices: context 2 x expert 2 x tensor 2": (1, 8, {"context": 2, "expert": 2, "tensor": 2}),
    "4 processes x 2 devices: pipeline 2 x data 2 x context 2": (4, 2, {"pipeline": 2, "data": 2, "context": 2}),
}


def train(workdir: Path, processes: int, devices: int, mesh: dict[str, int]) -> None:
    """One run, all processes of it; raises CalledProcessError."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in ({"data": 1} | mesh).items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [[f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={k}"] * (processes > 1)
           for k in range(processes)]
    commands = [[sys.executable, "-m", "gpt_jax", *TRAIN, f"--workdir={workdir}", f"--cpu_devices={devices}", *axes, *flags]
                for flags in own]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    for process, command in zip(started, commands):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)


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
    for width, (name, values) in zip((7, 5, 3.4, 2, 1), curves.items()):
        top.plot(range(1, len(values) + 1), values, linewidth=width, label=name)
    for i, (name, values) in enumerate(others, 1):
        bottom.semilogy(range(1, len(values) + 1), [max(abs(a / b - 1), 1e-9) for a, b in zip(values, first[1])],
                        color=f"C{i}", linewidth=1)
    top.set_ylabel("training loss, nats a token")
    bottom.set(xlabel="step", ylabel=f"relative to\n{first[0]}")
    top.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--add", action="append", default=[], metavar="NAME=WORKDIR")
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdirs = {name: Path(folder) / str(i) for i, name in enumerate(RUNS)}
        for name, run in RUNS.items():
            train(workdirs[name], *run)
        workdirs |= {name: Path(path) for name, _, path in (text.partition("=") for text in given.add)}
        curves = {name: losses(path) for name, path in workdirs.items()}
    first, steps = next(iter(curves.values())), len(next(iter(curves.values())))
    rows = {name: {"last loss": values[-1], "largest relative difference": max(
        abs(a / b - 1) for a, b in zip(values, first, strict=True))} for name, values in curves.items()}
    (HERE / "scale_out.json").write_text(json.dumps({"steps": steps, "runs": rows}, indent=1) + "\n")
    draw(curves, HERE / "pictures/scale_out.png")
    for name, row in rows.items():
        print(f"{row['last loss']:.6f}  {row['largest relative difference']:.1e}  {name}")


if __name__ == "__main__":
    main()
