"""How fast `gpt-jax prepare` is next to the `tokenizers` library itself, and how much memory it
takes.

    python benchmarks/prepare.py TEXTS [--megabytes=100] [--rounds=3] [--memory_megabytes=2000]

TEXTS is a folder of .txt and .txt.xz files (the numbers in prepare.json: Zizhi Tongjian in modern
Chinese, 14 MB, and five English books, 3 MB). They are cut into documents of 2,000 characters,
repeated to a jsonl of `megabytes`, and encoded by a BPE of 16,384 tokens trained on them:

- library: one call of encode_batch_fast on all documents, in memory as str; all its threads;
  nothing is written;
- prepare: the whole command, with start-up, reading, hashing, writing and checksums; a worker a
  core.

They take turns, so that a machine that slows down slows both. Memory: resident size of all
processes of `prepare`, summed (shared pages count several times), on a jsonl of `memory_megabytes`.
"""

import argparse
import json
import lzma
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import tokenizers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, VOCAB = 2000, 16384


def read_texts(folder: Path) -> list[str]:
    """Documents of all files, Chinese and English in turn."""
    files = [
        lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
        for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.txt.xz")])
    ]
    texts = [raw.decode("utf-8", "replace") for raw in files]
    return [text[i : i + DOCUMENT] for text in texts for i in range(0, len(text), DOCUMENT)]


def write_jsonl(path: Path, texts: list[str], megabytes: float) -> list[str]:
    """The documents again and again, each time with another number in front, until there are so
    many bytes."""
    size, number, written = 0, 0, []
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for text in texts:
                document = f"{number} {text}"
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size, number = size + len(document.encode()), number + 1
                written.append(document)
                if size >= megabytes * 1e6:
                    break
    return written


def library_seconds(tokenizer: str, texts: list[str]) -> float:
    library = tokenizers.Tokenizer.from_str(tokenizer)
    library.encode_special_tokens = True
    began = time.perf_counter()
    library.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - began


def prepare(source: Path, out: Path, tokenizer: Path, workers: int) -> tuple[float, int]:
    """(seconds, peak bytes) of the command."""
    shutil.rmtree(out, ignore_errors=True)
    given = [
        f"--input={source}",
        f"--output={out}",
        f"--tokenizer={tokenizer}",
        f"--workers={workers}",
    ]
    began, peak, done = time.perf_counter(), [0], threading.Event()
    command = [sys.executable, "-m", "gpt_jax", "prepare", *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)

    def watch() -> None:
        top = psutil.Process(process.pid)
        while not done.wait(0.1):
            total = 0
            try:
                for one in (top, *top.children(recursive=True)):
                    total += one.memory_info().rss
            except psutil.Error:  # ended between two looks
                pass
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    done.set(), watcher.join()
    if code:
        raise SystemExit(f"prepare ended with {code}")
    return seconds, peak[0]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("texts", type=Path)
    flags.add_argument("--megabytes", type=float, default=100)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--memory_megabytes", type=float, default=2000)
    args = flags.parse_args()
    workers = len(os.sched_getaffinity(0))
    sys.path.insert(0, str(ROOT))
    from gpt_jax.data.tokenizers.bpe import train_bpe

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = read_texts(args.texts)
        made = train_bpe(texts, VOCAB).content
        (folder / "tokenizer.json").write_text(made, encoding="utf-8")
        documents = write_jsonl(folder / "text.jsonl", texts, args.megabytes)
        megabytes = sum(len(text.encode()) for text in documents) / 1e6
        rounds = []
        for _ in range(args.rounds):
            library = megabytes / library_seconds(made, documents)
            seconds, peak = prepare(
                folder / "text.jsonl", folder / "out", folder / "tokenizer.json", workers
            )
            rounds.append(
                {
                    "library_mb_s": round(library, 3),
                    "prepare_mb_s": round(megabytes / seconds, 3),
                    "ratio": round(megabytes / seconds / library, 3),
                    "peak_mb": round(peak / 1e6),
                }
            )
            print(rounds[-1], flush=True)
        del documents
        memory = {}
        if args.memory_megabytes:
            write_jsonl(folder / "text.jsonl", texts, args.memory_megabytes)
            seconds, peak = prepare(
                folder / "text.jsonl", folder / "out", folder / "tokenizer.json", workers
            )
            memory = {
                "input_mb": round((folder / "text.jsonl").stat().st_size / 1e6),
                "peak_mb": round(peak / 1e6),
                "mb_s": round(args.memory_megabytes / seconds, 3),
            }
            print(memory, flush=True)
    found = {
        "machine": f"{platform.machine()}, {workers} cores",
        "tokenizers": tokenizers.__version__,
        "megabytes": round(megabytes),
        "median_ratio": statistics.median(row["ratio"] for row in rounds),
        "rounds": rounds,
        "memory": memory,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
