"""Drills: kills, signals, damage, full disks and fuzzed files at random, and what comes of each.

    python benchmarks/drills.py --count 20 --fuzz 300        # about a quarter of an hour on two cores
    python benchmarks/drills.py --only flip --count 200
    python benchmarks/drills.py --only jsonl --fuzz 3000 --seed 7

A drill draws from its seed, which `--seed` begins. A run that was killed or told to stop must end,
when it is started again, with the losses of a run that was left alone. Damage must be named, and an
older checkpoint used or code 51 given. A fuzzed file must be read, or refused with one line and a
code of gpt_jax/errors.py. A traceback, a signal, a hang or a silent difference is a fault, and the
line that repeats it is printed.

It prints a table, and with `--record` writes `drills.json` beside this file.
"""

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from drill_files import FORMATS, mutate, write_texts, write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
PLANNED = (2, 10, 20, 30, 32, 40, 41, 42, 50, 51)  # codes of gpt_jax/errors.py
PATIENCE = 300  # seconds after which a process counts as hanging
FUZZ_PATIENCE = 20
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Fault(Exception):
    """What should not have happened, in a line."""


# ---- the program ----


def start(words: list[str], folder: Path) -> subprocess.Popen:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_jax", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environ,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, output). Raises Fault if it hangs or shows a traceback."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Fault(f"still running after {PATIENCE} s") from None
    if "Traceback" in output:
        raise Fault(f"traceback: {output.strip().splitlines()[-1]}")
    return process.returncode, output


def train_words(folder: Path, workdir: Path) -> list[str]:
    return [
        "train",
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--workdir={workdir}",
        f"--config.data.path={folder / 'text.txt'}",
        f"--config.data.cache={folder / 'cache'}",
        f"--config.train.steps={STEPS}",
        "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep_last=4",
        "--config.eval.sample_tokens=4",
    ]


def read_losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


# ---- drills on runs ----


def end_and_resume(folder: Path, draw: random.Random, number: int, allowed: tuple) -> str:
    """Sends a signal at a random moment, then runs to the end. Returns how the first part ended."""
    workdir = folder / f"run{draw.random()}"
    process = start(train_words(folder, workdir), folder)
    time.sleep(draw.uniform(0.0, 1.1) * json.loads((folder / "seconds").read_text()))
    process.send_signal(number)
    code, output = finish(process)
    if code not in (0, *allowed):
        raise Fault(f"{signal.Signals(number).name} ended it with {code}: {output[-200:]}")

    code, output = finish(start(train_words(folder, workdir), folder))
    if code:
        raise Fault(f"the second start ended with {code}: {output[-200:]}")
    if read_losses(workdir) != read_losses(folder / "whole"):
        raise Fault("the losses differ from those of a run that was left alone")
    shutil.rmtree(workdir)
    return "resumed to the same losses"


def drill_kill(folder: Path, draw: random.Random) -> str:
    return end_and_resume(folder, draw, signal.SIGKILL, (-signal.SIGKILL,))


def drill_signal(folder: Path, draw: random.Random) -> str:
    number = draw.choice(SIGNALS)
    # Before the program listens, a signal ends it by itself.
    return end_and_resume(folder, draw, number, (10, 130, -number))


def damage(folder: Path, draw: random.Random, change: Callable[[bytearray], None]) -> str:
    """Changes a file of the newest checkpoint. Returns what `evaluate` made of it."""
    workdir = folder / f"damaged{draw.random()}"
    shutil.copytree(folder / "whole", workdir)
    newest = workdir / "checkpoints" / str(STEPS)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = draw.choice(files)
    raw = bytearray(file.read_bytes())
    change(raw)
    file.write_bytes(raw)

    words = ["evaluate", f"--checkpoint={workdir}", "--batches=1"]
    code, output = finish(start(words, folder))
    is_named = "is damaged and is passed over" in output
    shutil.rmtree(workdir)
    if code or not is_named:
        raise Fault(f"{file.relative_to(workdir)}: code {code}, named: {is_named}")
    return "named, and the one before used"


def drill_flip(folder: Path, draw: random.Random) -> str:
    def flip(raw: bytearray) -> None:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)

    return damage(folder, draw, flip)


def drill_cut(folder: Path, draw: random.Random) -> str:
    def cut(raw: bytearray) -> None:
        del raw[draw.randrange(len(raw)) :]

    return damage(folder, draw, cut)


def drill_full_disk(folder: Path, draw: random.Random) -> str:
    """A disk of random size fills up. It needs the right to mount."""
    disk = folder / f"disk{draw.random()}"
    disk.mkdir()
    size = draw.randrange(200, 3000)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        return "left out, because nothing may be mounted here"
    try:
        code, output = finish(start(train_words(folder, disk / "run"), folder))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    if code not in (0, 2, 50):
        raise Fault(f"{size} KiB: ended with {code}: {output[-200:]}")
    return f"ended with {code}"


RUNS = {
    "kill": drill_kill,
    "signal": drill_signal,
    "flip": drill_flip,
    "cut": drill_cut,
    "full disk": drill_full_disk,
}


# ---- fuzzed files ----


def read_text(path: Path, folder: Path) -> None:
    from gpt_jax import config
    from gpt_jax.data import load_dataset

    knobs = config.Data(
        path=(str(path),), cache=str(folder / "cache"), workers=1, tokenizer="bytes"
    )
    load_dataset(knobs, lambda line: None)


def read_tokenizer(path: Path, folder: Path) -> None:
    from gpt_jax.data import resolve_tokenizer

    resolve_tokenizer(str(path)).encode("some words")


READERS = dict.fromkeys(FORMATS, read_text) | {"tokenizer.json": read_tokenizer}


def fuzz(name: str, first: int, count: int, folder: Path) -> None:
    """Reads `count` fuzzed files in this process, and prints a line for each."""
    sys.path.insert(0, str(ROOT))
    from gpt_jax.errors import Exit

    sound = write_tokenizer(folder) if name == "tokenizer.json" else write_texts(folder, name)
    raw = sound.read_bytes()
    for seed in range(first, first + count):
        print(f"begin {seed}", flush=True)
        path = folder / f"fuzzed.{name}"
        path.write_bytes(mutate(raw, random.Random(f"{name} {seed}")))
        signal.alarm(FUZZ_PATIENCE)
        try:
            READERS[name](path, folder)
            verdict = "read"
        except Exit as end:
            is_line = "\n" not in str(end) and len(str(end)) < 2000
            verdict = f"refused with {end.code}" if is_line else "FAULT: a message of many lines"
        except BaseException as error:
            verdict = f"FAULT: {type(error).__name__}: {str(error)[:200]}"
        signal.alarm(0)
        print(f"end {verdict}", flush=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)


def drill_reader(name: str, first: int, count: int) -> list[tuple[int, str]]:
    """(seed, verdict) of each fuzzed file. A child process reads them, and may die of one."""
    verdicts = []
    while len(verdicts) < count:
        begin = first + len(verdicts)
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--fuzz_here", name, str(begin)]
            words += [str(count - len(verdicts)), folder]
            environ = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(words, capture_output=True, text=True, env=environ)
        ends = [line[4:] for line in done.stdout.splitlines() if line.startswith("end ")]
        verdicts += [(begin + i, verdict) for i, verdict in enumerate(ends)]
        if len(verdicts) < count:
            last = done.stderr.strip().splitlines()[-1:] or [""]
            text = f"FAULT: the process ended with {done.returncode}: {last[0][:200]}"
            verdicts.append((first + len(verdicts), text))
    return verdicts


# ---- all of them ----


def prepare_runs(folder: Path) -> None:
    """A text, and a run over it that nothing disturbs."""
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    (folder / "text.txt").write_text(" ".join(draw.choices(lexicon, k=4000)))
    for _ in range(2):  # the second finds everything compiled, and is timed
        shutil.rmtree(folder / "whole", ignore_errors=True)
        began = time.monotonic()
        code, output = finish(start(train_words(folder, folder / "whole"), folder))
        if code:
            raise SystemExit(output)
        (folder / "seconds").write_text(json.dumps(time.monotonic() - began))


def run_drills(names: list[str], seed: int, count: int) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if names:
            prepare_runs(folder)
        for name in names:
            found[name] = []
            for number in range(seed, seed + count):
                try:
                    verdict = RUNS[name](folder, random.Random(f"{name} {number}"))
                except Fault as fault:
                    verdict = f"FAULT: {fault}"
                found[name].append((number, verdict))
            report(name, found[name])
    return found


def report(name: str, verdicts: list[tuple[int, str]]) -> None:
    counts = collections.Counter(
        "FAULT" if verdict.startswith("FAULT") else verdict for _, verdict in verdicts
    )
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"{name:16} {len(verdicts):5}  {shown}", flush=True)
    for number, verdict in verdicts:
        if verdict.startswith("FAULT"):
            print(f"    --only '{name}' --seed {number} --count 1 --fuzz 1: {verdict}")


def main() -> None:
    if sys.argv[1:2] == ["--fuzz_here"]:
        name, first, count, folder = sys.argv[2:]
        fuzz(name, int(first), int(count), Path(folder))
        return

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="drills of each kind on runs")
    parser.add_argument("--fuzz", type=int, default=300, help="fuzzed files of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*RUNS, *READERS])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()

    runs = [name for name in RUNS if args.only in (None, name)]
    found = run_drills(runs, args.seed, args.count)
    for name in READERS:
        if args.only in (None, name):
            found[name] = drill_reader(name, args.seed, args.fuzz)
            report(name, found[name])

    faults = sum(verdict.startswith("FAULT") for all_ in found.values() for _, verdict in all_)
    print(f"{sum(map(len, found.values()))} drills, {faults} faults")
    if args.record:
        table = {name: collections.Counter(v for _, v in rows) for name, rows in found.items()}
        facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "seed": args.seed}
        text = json.dumps(facts | {"drills": table, "faults": faults}, indent=1)
        (Path(__file__).parent / "drills.json").write_text(text + "\n")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
