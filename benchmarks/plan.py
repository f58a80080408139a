"""The README's table of plans: for each model and machine the best mesh that the search finds, compiled.

    python benchmarks/plan.py                       every row that benchmarks/plan.json does not have yet, one at a time
    python benchmarks/plan.py --only=llama:8b       rows whose name has that in it
    python benchmarks/plan.py --table               the table in Markdown, from the file

Needs the extras plan and plan-gpu (pip install 'gpt_jax[plan,plan-gpu]'), no accelerator. A row is one command, which
is in the file: gpt-jax plan --config=configs/<model> --topology=<machine> --search --compile. Each takes 1 to 6 minutes
on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/plan.json"
MODELS = ("llama:8b", "llama:70b", "moe:8x7b", "gpt2:1558m", "modern:d26")
MACHINES = (("v5e-256", "v5e:16x16", 1), ("v5p-128", "v5p:4x4x4", 1), ("v5p-1024", "v5p:8x8x8", 1), ("v6e-256", "v6e:16x16", 1),
            ("TPU7x-128", "TPU7x:4x4x4", 1), ("2 x v5p-128", "v5p:4x4x4", 2), ("8 H100", "h100:8", 1), ("64 H100", "h100:64", 1),
            ("8 H200", "h200:8", 1))
# gpt2's vocabulary of 50,257 divides by nothing; its 480 rows of 1,024 tokens are too few for 256 devices and more.
CHANGES = {"gpt2:1558m": ("--config.model.vocab=50304", "--config.train.batch_size=512")}


def command(model: str, topology: str, slices: int) -> list[str]:
    name, variant = model.split(":")
    return ["plan", f"--config=configs/{name}.py:{variant}", f"--topology={topology}", f"--slices={slices}", "--search=5", "--compile",
            "--json", *CHANGES.get(model, ())]


def run(model: str, machine: tuple) -> dict:
    """One row. `error` where there is no plan."""
    name, topology, slices = machine
    arguments, began = command(model, topology, slices), time.time()
    done = subprocess.run([sys.executable, "-m", "gpt_jax", *arguments], cwd=ROOT, capture_output=True, text=True)
    row = {"model": model, "machine": name, "command": "gpt-jax " + " ".join(arguments), "wall_seconds": round(time.time() - began)}
    if not done.stdout.strip():
        return row | {"error": done.stderr.strip().splitlines()[-1]}
    plan = json.loads(done.stdout)
    made, schedule = plan.get("compiled") or {}, plan.get("schedule") or {}
    row |= {"best": plan["command"], "mesh": plan["mesh"], "kernel": plan["kernel"], "limit": plan["memory"]["limit"],
            "arithmetic": {key: plan[key] for key in ("step_seconds", "mfu_full", "mfu_causal", "bound_by")} | {
                "peak": plan["memory"]["peak"], "memory": plan["memory"]}, "problems": plan["problems"]}
    if made.get("refusal"):
        return row | {"error": made["refusal"]}
    program = made.pop("program", None)
    return row | {"compiled": made, "schedule": schedule, "fits": plan["fits"],
                  "collectives": program["collectives"][:8] if program else []}


def text(row: dict) -> str:
    """The row in Markdown."""
    gib = 2**30
    said = row.get("arithmetic")
    mesh = " ".join(f"{axis} {n}" for axis, n in row.get("mesh", {}).items() if n > 1)
    extra = " ".join(word.removeprefix("--config.") for word in row.get("best", "").split()
                     if "remat" in word or "accumulate" in word)
    if not said:
        return f"| {row['model']} | {row['machine']} | {row['error']} | | | | |"
    if "compiled" not in row:
        return (f"| {row['model']} | {row['machine']} | {mesh}; {extra} | arithmetic only: {said['peak'] / gib:.1f} | "
                f"{said['step_seconds']:.3g} s | {said['mfu_causal']:.1%} | {row['error'][:80]} |")
    done, plan = row["compiled"], row["schedule"]
    return (f"| {row['model']} | {row['machine']} | {mesh}; {extra} | {done['peak'] / gib:.1f} of {row['limit'] / gib:.1f} "
            f"({said['peak'] / done['peak'] - 1:+.0%}) | {plan['step']:.3g} s ({said['step_seconds']:.3g}) | {plan['mfu_causal']:.1%} "
            f"({said['mfu_causal']:.1%}) | {done['seconds']:.0f} s |")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default="")
    flags.add_argument("--table", action="store_true")
    args = flags.parse_args()
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    if args.table:
        print("| model | machine | best mesh | peak GiB (arithmetic) | step (arithmetic) | MFU, causal (arithmetic) | compiled in |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(text(rows[key]) for key in (f"{m} on {x[0]}" for m in MODELS for x in MACHINES) if key in rows))
        return
    for model in MODELS:
        for machine in MACHINES:
            key = f"{model} on {machine[0]}"
            if key in rows or args.only not in key or not (ROOT / f"configs/{model.split(':')[0]}.py").exists():
                continue
            row = run(model, machine)
            rows = json.loads(FILE.read_text()) if FILE.exists() else {}  # another process may have added some meanwhile
            rows[key] = row
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{rows[key]['wall_seconds']:>5} s  {text(rows[key])}", flush=True)


if __name__ == "__main__":
    main()
