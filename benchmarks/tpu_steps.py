"""Whole training steps for TPUs by the compiler's cycles, beside what MaxText publishes.

    python benchmarks/tpu_steps.py                 every row that benchmarks/tpu_steps.json lacks
    python benchmarks/tpu_steps.py --only=v5p      rows whose name has that in it
    python benchmarks/tpu_steps.py --anew          rows that it has too
    python benchmarks/tpu_steps.py --kept=FOLDER   keeps each program there, or reads it from there
    python benchmarks/tpu_steps.py --table         the table in Markdown, from the file

It needs the extra plan (pip install 'gpt_jax[plan]') and no accelerator. Each row is one command
`gpt-jax plan --compile`, which the file names. A row for v6e takes a quarter of an hour of CPU time
or more, because of the limit of the memory beside the matrix units that v6e has.
"""

import argparse
import datetime
import json
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tpu_step_tables import format_parts, format_steps

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/tpu_steps.json"
V6E_8B = (
    "--config=configs/llama.py:8b",
    "--topology=v6e:16x16",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=128",
    "--config.train.accumulate=1",
    "--config.eval.batch_size=512",
)
KEPT = "--config.compute.remat=names", "--config.compute.remat_save=q,k,v,attention"
# name -> words of the command.
ROWS = {
    "llama:8b, v6e-256, remat block": V6E_8B,
    "llama:8b, v6e-256, q, k, v and attention kept": (*V6E_8B, *KEPT),
    "llama:70b, v6e-256, remat block": (
        "--config=configs/llama.py:70b",
        "--topology=v6e:16x16",
        "--config.mesh.fsdp=128",
        "--config.mesh.tensor=2",
        "--config.compute.shard_sequence=true",
    ),
    "llama:70b, v5p-1024, remat dots": (
        "--config=configs/llama.py:70b",
        "--topology=v5p:8x8x8",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=128",
        "--config.mesh.context=2",
        "--config.compute.remat=dots",
    ),
}


def name_files(name: str, folder: Path) -> tuple[Path, Path]:
    """Returns where a row's report and the text of its program are kept."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{stem}.json", folder / f"{stem}.hlo"


def make_row(name: str, folder: Path) -> dict:
    """Compiles one row, unless its program is kept in the folder. It has `error` if that fails."""
    report, text = name_files(name, folder)
    words = ["plan", *ROWS[name], "--compile", "--json"]
    row = {"command": "gpt-jax " + " ".join(words)}
    if not (report.exists() and text.exists()):
        command = [sys.executable, "-m", "gpt_jax", *words, f"--keep_hlo={text}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if not text.exists():
            complaints = child.stderr.strip().splitlines() or [child.stdout[-400:]]
            return row | {"error": complaints[-1][:400]}
        report.write_text(json.dumps(json.loads(child.stdout) | {"cpu_seconds": round(seconds)}))

    made = datetime.date.fromtimestamp(text.stat().st_mtime).isoformat()
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    kept = json.loads(report.read_text())
    row |= {"date": made, "versions": versions, "cpu_seconds": kept["cpu_seconds"]}
    return row | {"peak": kept["compiled"]["peak"]} | count_step(name, text.read_text())


def count_step(name: str, text: str) -> dict:
    """Returns what the reader of programs counts in a row's program."""
    from gpt_jax.commands.config_file import load_config
    from gpt_jax.plan.estimate import estimate_job
    from gpt_jax.plan.job import make_job
    from gpt_jax.plan.program.program import read_program
    from gpt_jax.plan.schedule import estimate_schedule
    from gpt_jax.plan.topology import parse_topology

    flags = dict(word.split("=", 1) for word in ROWS[name][:2])
    topology = parse_topology(flags["--topology"])
    job = make_job(load_config(flags["--config"], list(ROWS[name][2:])))
    estimate = estimate_job(job, topology)
    program = asdict(read_program(text, estimate.shape))
    schedule = estimate_schedule(job, topology, estimate.kernel, program)

    seconds = {kind: cycles / topology.chip.clock for kind, cycles in program["work"].items()}
    train = job.config.train
    return {
        "tokens": train.batch_size * train.seq_len // topology.devices,
        "work": seconds,
        "of_peak": program["matmul_flops"] / seconds["matmuls"] / topology.peak,
        "schedule": schedule._asdict(),
        "collectives": program["collectives"][:8],
    }


def read_rows() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="")
    flags.add_argument("--anew", action="store_true")
    flags.add_argument("--kept", type=Path)
    flags.add_argument("--table", action="store_true")
    args = flags.parse_args()
    if args.table:
        print("\n".join([*format_parts(read_rows()), "", *format_steps(read_rows())]))
        return

    wanted = [name for name in ROWS if args.only in name]
    if not wanted:
        raise SystemExit(f"--only={args.only}: no row has that in its name")
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            if args.anew or name not in read_rows():
                row = make_row(name, args.kept or Path(folder))
                FILE.write_text(json.dumps(read_rows() | {name: row}, indent=1) + "\n")
                print(name, row.get("error", "done"), flush=True)


if __name__ == "__main__":
    main()
