"""Ten faults, each put into a copy of the tree, and whether the tests that should see it do.

    python benchmarks/seeded_faults.py                 all of them, into benchmarks/seeded_faults.json
    python benchmarks/seeded_faults.py --only=decode   those whose name has that in it
    python benchmarks/seeded_faults.py --table         the table in Markdown, from the file

A fault is caught if its tests pass without it and fail with it. The copies lie in a temporary
folder, and the tree itself is not touched.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/seeded_faults.json"
COPIED = ("gpt_jax", "configs", "tests", "launch", "pyproject.toml")
HEAD = "| fault | file | tests | caught | seconds |"


class Fault(NamedTuple):
    """`before` stands once in `file` and becomes `after`; `tests` are arguments of pytest."""

    file: str
    before: str
    after: str
    tests: str


FAULTS = {
    "sharding: a row's order is undone by itself": Fault(
        "gpt_jax/sharding/rows.py",
        "np.argsort(places) if back else places",
        "places",
        "tests/run/test_mesh_matrix.py -k modern-context2",
    ),
    "data order: every epoch is the first": Fault(
        "gpt_jax/data/stream/order.py",
        "keys = random_bits(seed, np.asarray(epoch)[None, :],",
        "keys = random_bits(seed, 0 * np.asarray(epoch)[None, :],",
        "tests/data/test_order.py -k permutation_is_a_bijection",
    ),
    "packing mask: documents of a row see each other": Fault(
        "gpt_jax/model/attention/mask.py",
        "mask = mask & same & (",
        "mask = mask & (",
        "tests/model/test_kernels.py::test_mask_equals_the_loop",
    ),
    "optimiser: matrices do not decay": Fault(
        "gpt_jax/train/optim/optimizer.py",
        ">= least",
        "> least",
        "tests/train/test_optim.py::test_against_numpy",
    ),
    "schedule: the cosine ends at 0": Fault(
        "gpt_jax/train/optim/schedule.py",
        "return optim.final_fraction + (1 - optim.final_fraction) * 0.5 * (1 +",
        "return 0.5 * (1 +",
        "tests/train/test_schedule.py",
    ),
    "resume: the averages of weights begin anew": Fault(
        "gpt_jax/run/resume.py",
        'ema=loaded.get("ema", {}))',
        'ema=loaded["params"] if "ema" in loaded else {})',
        "tests/run/test_run_checkpoints.py::test_resumed_with_averaged_weights_to_the_bit",
    ),
    "decode cache: a token is not counted": Fault(
        "gpt_jax/infer/decode.py",
        "hidden, cache, state.lengths + 1, state.seen",
        "hidden, cache, state.lengths, state.seen",
        "tests/infer/test_decode.py -k cached_equals_uncached",
    ),
    "tokenizer: SentencePiece's mark is no space": Fault(
        "gpt_jax/data/tokenizers/bpe.py",
        'token.replace("▁", " ")',
        "token",
        "tests/data/test_tokenizer_files.py -k json_that_puts_a_space",
    ),
    "plan: logits have no gradient": Fault(
        "gpt_jax/plan/memory.py",
        "LOGITS = 2.0",
        "LOGITS = 1.0",
        "tests/plan/test_memory.py",
    ),
    "exit code: a killed process counts as a bug": Fault(
        "gpt_jax/cluster/launch_local.py",
        'return PeerFailed.code, f"process {k} was killed by',
        'return 1, f"process {k} was killed by',
        "tests/cluster/test_launch_local.py -k restarts_by_the_policy",
    ),
}


def run_tests(tree: Path, words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *words.split()]
    environ = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)


def try_fault(fault: Fault) -> dict:
    """A row: whether the tests pass without the fault and fail with it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        began = time.monotonic()
        whole = run_tests(tree, fault.tests)
        if whole.returncode:
            raise SystemExit(f"{fault.tests}: fails without a fault\n{whole.stdout}{whole.stderr}")

        path = tree / fault.file
        text = path.read_text()
        if text.count(fault.before) != 1:
            raise SystemExit(f"{fault.file}: does not have {fault.before!r} once")
        path.write_text(text.replace(fault.before, fault.after))
        broken = run_tests(tree, fault.tests)
        seconds = round(time.monotonic() - began, 1)
    # pytest ends with 1 if a test fails, and with 2 and more if it cannot run them.
    caught = broken.returncode == 1
    return dict(file=fault.file, tests=fault.tests, caught=caught, seconds=seconds)


def format_row(name: str, row: dict) -> str:
    answer = "yes" if row["caught"] else "**no**"
    return f"| {name} | `{row['file']}` | `{row['tests']}` | {answer} | {row['seconds']} |"


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", default="")
    flags.add_argument("--table", action="store_true")
    args = flags.parse_args()
    if args.table:
        rows = json.loads(FILE.read_text())["faults"]
        print(f"{HEAD}\n{'|---' * 5}|")
        print("\n".join(format_row(name, row) for name, row in rows.items()))
        return

    rows = {}
    for name, fault in FAULTS.items():
        if args.only in name:
            rows[name] = try_fault(fault)
            print(format_row(name, rows[name]), flush=True)
    if rows:
        before = json.loads(FILE.read_text())["faults"] if FILE.exists() else {}
        rows = {name: row for name, row in (before | rows).items() if name in FAULTS}
        machine = (
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        )
        content = dict(command="python benchmarks/seeded_faults.py", machine=machine, faults=rows)
        FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    missed = [name for name, row in rows.items() if not row["caught"]]
    raise SystemExit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
