"""CPU time of `gpt-jax convert`: this tree beside another checkout, in turns.

    git worktree add --detach ../before COMMIT
    python benchmarks/convert_turns.py --before=../before [--layers=1] [--rounds=3] [--record]

It makes a directory in the shape of Llama 2 7B as convert.py does, with fewer layers and a
vocabulary of 4,096. Each conversion is a process of its own, and counts from the end of its
imports. CPU time is that of all threads, hashing included. The time by the clock says little on a
machine that does other work. With `--record` it writes convert_turns.json beside this file.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import convert

HERE = Path(__file__).resolve().parent
VOCAB = 4096
MEASURED = """
import json, resource, sys, time
import jax, orbax.checkpoint, safetensors, tensorstore
from gpt_jax.commands import convert
wall, cpu = time.perf_counter(), time.process_time()
convert.main(sys.argv[1:])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps({"cpu seconds": cpu, "seconds": wall, "memory_gb": memory}))
"""


def measure(tree: Path, folder: Path, arguments: list[str]) -> dict:
    """One conversion by the package of `tree`."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def name_commit(tree: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, cwd=tree, text=True).strip()


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--before", type=Path, required=True, help="another checkout")
    flags.add_argument("--layers", type=int, default=1)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--record", action="store_true")
    args = flags.parse_args()
    trees = {"before": args.before.resolve(), "after": HERE.parent}

    passes: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert.LLAMA_7B["vocab"] = VOCAB
        size = convert.draw_directory(folder / "hf", args.layers)
        for _ in range(args.rounds):
            for which, tree in trees.items():
                steps = {
                    "to a checkpoint": ["--from=hf", f"--to={which}", "--tokenizer=bytes"],
                    "to a directory": [f"--from={which}", f"--to={which}-hf", "--dtype=bfloat16"],
                }
                for step, arguments in steps.items():
                    found = measure(tree, folder, arguments)
                    passes.setdefault(f"{step}, {which}", []).append(found)
                    print(step, which, json.dumps(found), flush=True)
                shutil.rmtree(folder / which)
                shutil.rmtree(folder / f"{which}-hf")

    if args.record:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        made = {
            "machine": machine,
            "date": datetime.date.today().isoformat(),
            "load": os.getloadavg()[2],
            "commit before": name_commit(trees["before"]),
            "layers": args.layers,
            "megabytes of bfloat16": size / 1e6,
            "passes": passes,
        }
        (HERE / "convert_turns.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
