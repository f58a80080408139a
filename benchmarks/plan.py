"""The table of plans on the page plan_table: each model on each machine, on the mesh that the
search likes best, compiled.

    python benchmarks/plan.py                   every row that benchmarks/plan.json lacks, in turn
    python benchmarks/plan.py --anew            every row again, also those that it has
    python benchmarks/plan.py --only=llama:8b   rows whose name has that in it
    python benchmarks/plan.py --refresh         the arithmetic of its rows anew; nothing compiles
    python benchmarks/plan.py --table           the table in Markdown, from the file
    python benchmarks/plan.py --published       rows beside what MaxText publishes, in Markdown

It needs the extras plan and plan-gpu (pip install 'gpt_jax[plan,plan-gpu]') and no accelerator. A
row is one command, which the file names: gpt-jax plan --config=configs/<model>
--topology=<machine> --search --compile. On 2 cores GPU programs compile in 10 to 100 s, TPU
programs in 1 to 10 minutes.
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
# name -> (--topology, --slices)
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
# The vocabulary of gpt2, 50,257, divides by nothing, and its 480 rows of 1,024 tokens are too few
# for 256 devices and more.
CHANGES = {"gpt2:1558m": ("--config.model.vocab=50304", "--config.train.batch_size=512")}
HEAD = (
    "| model | machine | best mesh | peak GiB (arithmetic) | step (arithmetic) | "
    "MFU, causal (arithmetic) | compiled in |"
)
# Percent MFU that MaxText's README and recipes publish, measured. The attention map counts in full.
# (MaxText's model and machine, MFU, our row)
PUBLISHED = (
    ("Llama 3.1 8B, v6e-256", 45.5, "llama:8b on v6e-256"),
    ("Llama 3.1 70B, v6e-256", 50.3, "llama:70b on v6e-256"),
    ("Mixtral 8x7B, v6e-256, rows of 4,096", 35.2, "moe:8x7b on v6e-256"),
    ("Llama 2 70B, 512 chips of v5p", 65.4, "llama:70b on v5p-1024"),
    ("Mixtral 8x7B, v5p", 52.6, "moe:8x7b on v5p-128"),
    ("Llama 3.1 70B, TPU7x", 52.3, "llama:70b on TPU7x-128"),
    ("Llama 3.1 405B, v5p", 68.5, ""),
    ("Llama 3.1 405B, TPU7x", 54.7, ""),
)
# Fields of the arithmetic that a row keeps.
ARITHMETIC = ("step_seconds", "mfu_full", "mfu_causal", "bound_by", "memory")
MOST_COLLECTIVES = 8  # Of a program, that a row keeps.


def list_words(model: str, machine: str, *more: str) -> list[str]:
    """Returns the words of the command for a row."""
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


def run_plan(words: list[str]) -> tuple[dict | None, str]:
    """Returns (what the command prints, or None; the last line of its complaints)."""
    command = [sys.executable, "-m", "gpt_jax", *words]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    complaints = process.stderr.strip().splitlines() or [""]
    report = json.loads(process.stdout) if process.stdout.strip() else None
    return report, complaints[-1].removeprefix("gpt-jax: ")


def select_arithmetic(report: dict) -> dict:
    return {key: report["arithmetic"][key] for key in ARITHMETIC}


def make_row(model: str, machine: str) -> dict:
    """Plans and compiles one row. It has `error` if nothing fits."""
    words = list_words(model, machine, "--search=5", "--compile")
    began = time.time()
    report, complaint = run_plan(words)
    row = {
        "model": model,
        "machine": machine,
        "command": "gpt-jax " + " ".join(words),
        "wall_seconds": round(time.time() - began),
    }
    # There is a command only for a mesh whose program fits.
    if report is None or "command" not in report:
        return row | {"error": complaint}

    program = report["compiled"].pop("program")
    return row | {
        "best": report["command"],
        "mesh": report["mesh"],
        "kernel": report["kernel"],
        "arithmetic": select_arithmetic(report),
        "compiled": report["compiled"],
        "schedule": report["schedule"],
        "fits": report["fits"],
        "collectives": program["collectives"][:MOST_COLLECTIVES],
    }


def refresh_row(row: dict) -> dict:
    """Returns the row with its arithmetic made anew."""
    if "best" not in row:
        return row
    overrides = [word for word in row["best"].split() if word.startswith("--config.")]
    report, complaint = run_plan(list_words(row["model"], row["machine"], *overrides))
    if report is None:
        raise SystemExit(f"{row['model']} on {row['machine']}: {complaint}")
    return row | {"arithmetic": select_arithmetic(report)}


def format_row(row: dict) -> str:
    """Returns the row in Markdown."""
    start = f"| {row['model']} | {row['machine']} |"
    if "compiled" not in row:
        return f"{start} {row['error']} | | | | |"

    arithmetic = row["arithmetic"]
    peak = arithmetic["memory"]["peak"] / GIB
    step = arithmetic["step_seconds"]
    mfu = arithmetic["mfu_causal"]
    compiled = row["compiled"]
    schedule = row["schedule"]
    limit = arithmetic["memory"]["limit"] / GIB
    return (
        f"{start} {format_mesh(row)} | {compiled['peak'] / GIB:.1f} of {limit:.1f} ({peak:.1f}) | "
        f"{schedule['step']:.3g} s ({step:.3g}) | {schedule['mfu_causal']:.1%} ({mfu:.1%}) | "
        f"{compiled['seconds']:.0f} s |"
    )


def format_published(rows: dict) -> list[str]:
    """Returns the lines of a table of MaxText's MFU and ours, both of the full attention map."""
    lines = [
        "| MaxText's run | measured there | our row | by arithmetic | by cycles |",
        "|---" * 5 + "|",
    ]
    for run, published, key in PUBLISHED:
        ours = "none | |"
        if key in rows:
            arithmetic = rows[key]["arithmetic"]["mfu_full"]
            cycles = rows[key]["schedule"]["mfu_full"]
            ours = f"{key} | {arithmetic:.1%} | {cycles:.1%}"
        lines.append(f"| {run} | {published}% | {ours} |")
    return lines


def format_mesh(row: dict) -> str:
    """Returns the axes of the row's mesh, its remat policy and its accumulation."""
    axes = [f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1]
    knobs = [
        word.removeprefix("--config.")
        for word in row["best"].split()
        if "remat" in word or "accumulate" in word
    ]
    return " ".join([*axes, *knobs])


def read_rows() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def keep_row(key: str, row: dict) -> None:
    """Writes a row into the file as it is now; another process may have added rows meanwhile."""
    FILE.write_text(json.dumps(read_rows() | {key: row}, indent=1) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="")
    modes = flags.add_mutually_exclusive_group()
    for name in ("--anew", "--refresh", "--table", "--published"):
        modes.add_argument(name, action="store_true")
    args = flags.parse_args()

    names = {f"{model} on {machine}": (model, machine) for model in MODELS for machine in MACHINES}
    wanted = {key: name for key, name in names.items() if args.only in key}
    if not wanted:
        first = next(iter(names))
        raise SystemExit(f"--only={args.only}: no row has that in its name; rows are, say, {first}")
    if args.published:
        print("\n".join(format_published(read_rows())))
        return
    if args.table:
        rows = read_rows()
        print(HEAD)
        print("|---" * 7 + "|")
        print("\n".join(format_row(rows[key]) for key in wanted if key in rows))
        return

    for key, (model, machine) in wanted.items():
        row = read_rows().get(key)
        if args.refresh and row:
            keep_row(key, refresh_row(row))
        elif not args.refresh and (args.anew or not row):
            row = make_row(model, machine)
            keep_row(key, row)
            print(f"{row['wall_seconds']:>5} s  {format_row(row)}", flush=True)


if __name__ == "__main__":
    main()
