"""The table of docs/plan_table.md: for each model and machine the best mesh that the search finds,
compiled.

    python benchmarks/plan.py                       every row that benchmarks/plan.json does not have yet, one at a time
    python benchmarks/plan.py --anew                every row again, also those that it has
    python benchmarks/plan.py --only=llama:8b       rows whose name has that in it
    python benchmarks/plan.py --refresh             the arithmetic of the rows that there are, anew (nothing compiles)
    python benchmarks/plan.py --table               the table in Markdown, from the file

Needs the extras plan and plan-gpu (pip install 'gpt_jax[plan,plan-gpu]'), no accelerator. A row is
one command, which is in the file: gpt-jax plan --config=configs/<model> --topology=<machine>
--search --compile. On 2 cores GPU programs compile in 10 to 100 s, TPU programs in 1 to 10 minutes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/plan.json"
GIB = 2**30
MODELS = ("llama:8b", "llama:70b", "moe:8x7b", "gpt2:1558m", "modern:d26")
MACHINES = {
    "v5e-256": ("v5e:16x16", 1),
    "v5p-128": ("v5p:4x4x4", 1),
    "v5p-1024": ("v5p:8x8x8", 1),
    "v6e-256": ("v6e:16x16", 1),
    "TPU7x-128": ("TPU7x:4x4x4", 1),
    "2 x v5p-128": ("v5p:4x4x4", 2),
    "8 H100": ("h100:8", 1),
    "64 H100": ("h100:64", 1),
    "8 H200": ("h200:8", 1),
}
# gpt2's vocabulary of 50,257 divides by nothing; its 480 rows of 1,024 tokens are too few for 256
# devices and more.
CHANGES = {"gpt2:1558m": ("--config.model.vocab=50304", "--config.train.batch_size=512")}
HEAD = (
    "| model | machine | best mesh | peak GiB (arithmetic) | step (arithmetic) | MFU, causal "
    "(arithmetic) | "
    "compiled in |"
)


def arguments(model: str, machine: str, *more: str) -> list[str]:
    name, variant = model.split(":")
    topology, slices = MACHINES[machine]
    return [
        "plan",
        f"--config=configs/{name}.py:{variant}",
        f"--topology={topology}",
        f"--slices={slices}",
        "--json",
        *CHANGES.get(model, ()),
        *more,
    ]


def plan(*words: str) -> tuple[dict | None, str]:
    """(what the command prints, the last line of its complaints)."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", *words], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stderr.strip().splitlines() or [""]
    return json.loads(done.stdout) if done.stdout.strip() else None, said[-1].removeprefix(
        "gpt-jax: "
    )


def arithmetic(found: dict) -> dict:
    return {
        key: found["arithmetic"][key]
        for key in ("step_seconds", "mfu_full", "mfu_causal", "bound_by", "memory")
    }


def run(model: str, machine: str) -> dict:
    """One row; `error` where there is no plan or it did not compile."""
    words, began = arguments(model, machine, "--search=5", "--compile"), time.time()
    found, complaint = plan(*words)
    row = {
        "model": model,
        "machine": machine,
        "command": "gpt-jax " + " ".join(words),
        "wall_seconds": round(time.time() - began),
    }
    if found is None or not found.get("search"):
        return row | {"error": complaint}
    row |= {
        "best": found["command"],
        "mesh": found["mesh"],
        "kernel": found["kernel"],
        "arithmetic": arithmetic(found),
    }
    if not found["compiled"] or found["compiled"]["refusal"]:
        return row | {"error": found["compiled"]["refusal"] if found["compiled"] else complaint}
    program = found["compiled"].pop("program")
    return row | {
        "compiled": found["compiled"],
        "schedule": found["schedule"],
        "fits": found["fits"],
        "collectives": program["collectives"][:8],
    }


def refresh(row: dict) -> dict:
    """The row with its arithmetic made anew."""
    if "best" not in row:
        return row
    overrides = [word for word in row["best"].split() if word.startswith("--config.")]
    found, complaint = plan(*arguments(row["model"], row["machine"], *overrides))
    if found is None:
        raise SystemExit(f"{row['model']} on {row['machine']}: {complaint}")
    return row | {"arithmetic": arithmetic(found)}


def text(row: dict) -> str:
    """The row in Markdown."""
    start = f"| {row['model']} | {row['machine']} |"
    if "arithmetic" not in row:
        return f"{start} {row['error']} | | | | |"
    said, peak = row["arithmetic"], row["arithmetic"]["memory"]["peak"] / GIB
    knobs = [
        word.removeprefix("--config.")
        for word in row["best"].split()
        if "remat" in word or "accumulate" in word
    ]
    mesh = " ".join([*(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1), *knobs])
    if "compiled" not in row:
        return (
            f"{start} {mesh} | ({peak:.1f}) | ({said['step_seconds']:.3g} s) | "
            f"({said['mfu_causal']:.1%}) | "
            f"{row['error'][:90]} |"
        )
    done, time_of = row["compiled"], row["schedule"]
    return (
        f"{start} {mesh} | {done['peak'] / GIB:.1f} of {said['memory']['limit'] / GIB:.1f} "
        f"({peak:.1f}) | "
        f"{time_of['step']:.3g} s ({said['step_seconds']:.3g}) | {time_of['mfu_causal']:.1%} "
        f"({said['mfu_causal']:.1%}) | {done['seconds']:.0f} s |"
    )


def stored() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def keep(key: str, row: dict) -> None:
    """Into the file as it is now: another process may have added rows meanwhile."""
    FILE.write_text(json.dumps(stored() | {key: row}, indent=1) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="")
    what = flags.add_mutually_exclusive_group()
    for name in ("--anew", "--refresh", "--table"):
        what.add_argument(name, action="store_true")
    args = flags.parse_args()
    names = {f"{model} on {machine}": (model, machine) for model in MODELS for machine in MACHINES}
    wanted = {key: name for key, name in names.items() if args.only in key}
    if not wanted:
        raise SystemExit(
            f"--only={args.only}: no row has that in its name; rows are, say, {next(iter(names))}"
        )
    if args.table:
        print(HEAD + "\n" + "|---" * 7 + "|")
        print("\n".join(text(row) for key in wanted if (row := stored().get(key))))
        return
    for key, (model, machine) in wanted.items():
        if args.refresh and key in stored():
            keep(key, refresh(stored()[key]))
        elif not args.refresh and (args.anew or key not in stored()):
            keep(key, run(model, machine))
            print(f"{stored()[key]['wall_seconds']:>5} s  {text(stored()[key])}", flush=True)


if __name__ == "__main__":
    main()
