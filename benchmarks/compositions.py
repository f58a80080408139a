"""Random compositions of settings on fake devices, each against one device without a mesh.

    python benchmarks/compositions.py --count 1000 --seed 0      # seconds of one core each
    python benchmarks/compositions.py --one 123                  # one of them, in this process

A seed draws model, masks, optimiser, mesh, kernel, remat and accumulation
(`tests/support/compositions.py`). `tests/support/comparisons.py` says what is compared. Seeds run in
child processes, because XLA ends a process whose devices wait for each other for 40 s. Each result
is a line of the file `--results`. A seed that is there already is not run again, so that the command
can be stopped and repeated.

It prints each failure with the line that repeats it, and tables by knob of all results in the file.
With `--record` it writes `compositions.json` beside this file.
"""

import argparse
import collections
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jaxlib

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
SILENT = 600  # seconds without a result after which a child process is ended
DEVICES = 8
# LLVM's optimiser takes more than half of the time that a tiny program costs, and the newer fusion
# emitters half of the rest (tests/conftest.py).
FLAGS = ["--xla_backend_optimization_level=0"]
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
KNOBS = (
    "mesh axes",
    "devices",
    "masks.documents",
    "masks.targets",
    "masks.prefix",
    "compute.kernel",
    "compute.remat",
    "compute.shard_sequence",
    "train.accumulate",
    "train.loss_chunk",
    "mesh.zero",
    "optim.optimizer",
    "model.norm",
    "model.position",
    "feed-forward",
)


def start_devices(default_compiler: bool) -> None:
    """Fake devices as the commands start them (gpt_jax/commands/runtime.py)."""
    from gpt_jax.commands.environment import keep_threads

    has_old = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 12)
    flags = [] if default_compiler else [*FLAGS, *[OLD_EMITTERS] * has_old]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *flags])
    keep_threads(DEVICES)
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


# ---- one seed ----


def list_knobs(drawn) -> dict[str, list[str]]:
    """What the tables count a draw under; a knob can have several values at once."""
    from gpt_jax import config

    values = config.flatten(drawn.settings)
    values |= {f"masks.{name}": value for name, value in vars(drawn.masks).items()}
    values["devices"] = config.least_devices(drawn.settings.mesh)
    lists = {name: [str(values[name])] for name in KNOBS if name in values}
    lists["mesh axes"] = list(drawn.shape) or ["none"]
    lists["feed-forward"] = sorted({ffn for _, ffn in drawn.settings.model.pattern})
    return lists


def name_worst(parts: dict[str, float]) -> list:
    return list(max(parts.items(), key=lambda item: item[1])) if parts else ["", 0.0]


def count_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run_seed(seed: int) -> dict:
    """The result of a seed. An exception is one too."""
    import comparisons
    import compositions

    start = count_seconds()
    drawn = compositions.draw(seed)
    row = {"seed": seed, "knobs": list_knobs(drawn), "refused": drawn.refused}
    try:
        apart = comparisons.compare(drawn)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        row["faults"] = [f"{type(error).__name__}: {text[:300]}"]
    else:
        row["faults"] = comparisons.find_faults(apart)
        row["worst"] = {
            "metrics": name_worst(apart.metrics),
            "gradients": name_worst(apart.gradients),
            "updates": name_worst(apart.updates),
        }
    return row | {"cpu_seconds": round(count_seconds() - start, 1)}


def run_one(seed: int) -> None:
    """Prints everything about a seed."""
    import compositions

    drawn = compositions.draw(seed)
    print(json.dumps(compositions.describe(drawn.settings) | vars(drawn.masks), indent=1))
    print(json.dumps(run_seed(seed), indent=1))


def work(seeds: list[int], results: Path) -> None:
    """Runs seeds in this process, a line of `results` each."""
    for seed in seeds:
        row = run_seed(seed)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


# ---- many seeds ----


def read_results(path: Path) -> dict[int, dict]:
    if not path.exists():
        return {}
    return {row["seed"]: row for row in map(json.loads, path.read_text().splitlines())}


def wait(child: subprocess.Popen, results: Path) -> int:
    """The code of a child that ended, or that was ended because it was silent for too long."""
    size, since = -1, time.monotonic()
    while child.poll() is None:
        now = results.stat().st_size if results.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > SILENT:
            child.kill()
        time.sleep(1)
    return child.returncode


def run_chunk(seeds: list[int], results: Path, more: list[str]) -> None:
    """Runs seeds in child processes: a new one behind each seed that ended its process."""
    while seeds:
        log = results.with_suffix(f".{seeds[0]}.log")
        given = [sys.executable, __file__, "--results", str(results), *more]
        given += ["--work", *map(str, seeds)]
        with log.open("w") as file:
            code = wait(subprocess.Popen(given, stdout=file, stderr=file), results)
        seeds = [seed for seed in seeds if seed not in read_results(results)]
        if not seeds:
            if not log.stat().st_size:
                log.unlink()
            return

        import compositions

        drawn = compositions.draw(seeds[0])
        text = log.read_text(errors="replace")
        stuck = "may be stuck" in text
        row = {"seed": seeds[0], "knobs": list_knobs(drawn), "refused": drawn.refused}
        row["faults"] = [f"its process ended with {code}" + ", devices waiting" * stuck]
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        seeds = seeds[1:]


def count_refusals(rows: list[dict]) -> dict[str, dict]:
    """Field -> how often it was refused, and one such line."""
    fields: dict[str, dict] = {}
    for row in rows:
        for line in {line for text in row["refused"] for line in text.splitlines()}:
            field = re.split(r"[ =:]", line, maxsplit=1)[0].removeprefix("config.")
            entry = fields.setdefault(field, {"seeds": 0, "example": line})
            entry["seeds"] += 1
    return dict(sorted(fields.items(), key=lambda item: -item[1]["seeds"]))


def summarize(rows: list[dict]) -> dict:
    """Figures of all results."""
    knobs: dict[str, collections.Counter] = {name: collections.Counter() for name in KNOBS}
    failed: dict[str, collections.Counter] = {name: collections.Counter() for name in KNOBS}
    for row in rows:
        for name, values in row["knobs"].items():
            knobs[name].update(values)
            if row["faults"]:
                failed[name].update(values)

    done = [row for row in rows if "worst" in row]
    worst = {}
    for kind in ("metrics", "gradients", "updates"):
        ordered = sorted((*row["worst"][kind][::-1], row["seed"]) for row in done)
        values = [value for value, *_ in ordered]
        worst[kind] = {
            "median": values[len(values) // 2],
            "99 of 100": values[len(values) * 99 // 100],
            "largest": list(ordered[-1]),
        }
    seconds = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    return {
        "compositions": len(rows),
        "failed": sum(bool(row["faults"]) for row in rows),
        "worst difference of a composition": worst,
        "cpu seconds each": round(sum(seconds) / len(seconds), 1),
        "knobs": {
            name: {value: [count, failed[name][value]] for value, count in sorted(counts.items())}
            for name, counts in knobs.items()
        },
        "refused before": sum(len(row["refused"]) for row in rows),
        "refused fields": count_refusals(rows),
    }


def print_tables(summary: dict) -> None:
    print(f"\n{summary['compositions']} compositions, {summary['failed']} failed")
    for kind, row in summary["worst difference of a composition"].items():
        print(
            f"{kind}: median {row['median']:.1e}, largest {row['largest'][0]:.1e} {row['largest'][1:]}"
        )
    print("\n| knob | values: compositions (failed) |\n|---|---|")
    for name, values in summary["knobs"].items():
        cells = [
            f"{value}: {count}" + f" ({bad})" * bool(bad) for value, (count, bad) in values.items()
        ]
        print(f"| {name} | {', '.join(cells)} |")
    print(f"\n{summary['refused before']} draws were refused:")
    for field, row in summary["refused fields"].items():
        print(f"  {row['seeds']:5} {field}, as in: {row['example'][:150]}")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--count", type=int, default=1000)
    flags.add_argument("--seed", type=int, default=0, help="the first seed")
    flags.add_argument("--chunk", type=int, default=20, help="seeds of a child process")
    flags.add_argument("--results", type=Path, default=Path("runs/compositions.jsonl"))
    flags.add_argument("--record", action="store_true", help="write compositions.json")
    flags.add_argument(
        "--default_compiler", action="store_true", help="XLA as users have it, which takes longer"
    )
    flags.add_argument("--one", type=int, help="run this seed alone, in this process")
    flags.add_argument("--work", type=int, nargs="+", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.one is not None or args.work:
        start_devices(args.default_compiler)
    if args.one is not None:
        return run_one(args.one)
    if args.work:
        return work(args.work, args.results)

    args.results.parent.mkdir(parents=True, exist_ok=True)
    more = ["--default_compiler"] * args.default_compiler
    wanted = range(args.seed, args.seed + args.count)
    for start in wanted[:: args.chunk]:
        chunk = [seed for seed in range(start, start + args.chunk) if seed in wanted]
        before = read_results(args.results)
        run_chunk([seed for seed in chunk if seed not in before], args.results, more)
        for seed, row in read_results(args.results).items():
            if seed in chunk and row["faults"]:
                print(f"FAILED {seed}: {'; '.join(row['faults'])}")
                print(f"  python benchmarks/compositions.py --one {seed}", *more, flush=True)

    results = read_results(args.results)
    summary = summarize(list(results.values()))
    print_tables(summary)
    if args.record:
        import jax

        summary |= {
            "jax": jax.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        Path(__file__).with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
