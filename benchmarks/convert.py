"""Memory and speed of `gpt-jax convert` on a directory of 7B parameters.

    python benchmarks/convert.py [--folder=DIR] [--layers=32]      # 45 GB of disk, some minutes

It makes a directory of Hugging Face in the shape of Llama 2 7B, in bfloat16 and in shards, with
drawn weights. It copies that directory with `cp` as a measure of the disk. Then it converts it to a
checkpoint, and the checkpoint back. Each conversion is a process of its own, whose largest memory
the system reports. The speed is the bytes of bfloat16 over the time, hashing the checkpoint
included. convert.json next to this file has the figures by the number of layers.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gpt_jax.data import resolve_tokenizer
from gpt_jax.interop import Origin, list_shapes, write_directory
from gpt_jax.interop.architecture import resolve_model

HERE = Path(__file__).resolve().parent
LLAMA_7B = dict(
    embed=4096,
    heads=32,
    mlp=11008,
    vocab=32000,
    max_seq=4096,
    norm="rmsnorm",
    position="rotary",
    pattern=(("attention", "swiglu"),),
    bias=False,
    tied=False,
)
BLOCK = 2**22  # values that are drawn once, and repeated


def draw_directory(folder: Path, layers: int) -> int:
    """Writes the directory, and returns the bytes of its tensors."""
    model = resolve_model(LLAMA_7B | dict(layers=layers))
    shapes = list_shapes(model)
    block = np.random.default_rng(0).standard_normal(BLOCK, np.float32)

    def read(path, index):
        shape = [len(range(*part.indices(n))) for part, n in zip(index, shapes[path], strict=True)]
        return np.resize(block, shape) * 0.02

    origin = Origin("drawn", model, shapes, read, resolve_tokenizer("bytes"), {})
    write_directory(origin, folder, dtype="bfloat16")
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def run(command: list[str]) -> tuple[float, float]:
    """Runs a command. Returns its seconds, and its largest memory in GB."""
    began = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--folder", type=Path, default=Path("convert-benchmark"))
    flags.add_argument("--layers", type=int, default=32)
    args = flags.parse_args()
    folder = args.folder
    folder.mkdir(parents=True)

    size = draw_directory(folder / "hf", args.layers)
    seconds, _ = run(["cp", "-r", str(folder / "hf"), str(folder / "copy")])
    shutil.rmtree(folder / "copy")
    rows = {"cp": {"seconds": seconds, "mb_per_second": size / 1e6 / seconds}}

    convert = [sys.executable, "-m", "gpt_jax", "convert"]
    steps = {
        "to a checkpoint": ["--from", "hf", "--to=native", "--tokenizer=bytes"],
        "to a directory": ["--from", "native", "--to=again", "--dtype=bfloat16"],
    }
    os.chdir(folder)
    for name, given in steps.items():
        seconds, memory = run([*convert, *given])
        rows[name] = {
            "seconds": seconds,
            "mb_per_second": size / 1e6 / seconds,
            "memory_gb": memory,
        }
        print(name, json.dumps(rows[name]), flush=True)

    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "load": os.getloadavg()[2],
        "parameters": size // 2,
        "gigabytes": size / 1e9,
        **rows,
    }
    path = HERE / "convert.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {f"{args.layers} layers": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
