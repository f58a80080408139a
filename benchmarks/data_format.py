"""Random windows of 1,024 tokens from a 2 GB set: which file format, and how it is read.

    .venv/bin/python benchmarks/data_format.py --folder /some/disk [--gigabytes 2]

The same tokens (uint16) as one flat file, read through a memory map and by place (`preadv`, what
gpt_jax does), and as ArrayRecord of one record a window, with random access options, one record a
call and 64 a call. Order: gpt_jax's own global permutation. Cold: the files' pages are dropped from
the cache before each reader (posix_fadvise), so that every window comes from the disk; warm: the
file has been read once. One thread; best of three alternating rounds when warm. Writes
data_format.json next to this file.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from gpt_jax.data.stream.order import permute
from gpt_jax.data.tokens.shards import TokenFile

WINDOW = 1024


def make(folder: Path, windows: int) -> tuple[Path, Path]:
    """(flat file, ArrayRecord file), made if they are not there."""
    flat, records = folder / f"{windows}.tokens", folder / f"{windows}.array_record"
    rng = np.random.default_rng(0)
    if not flat.exists():
        with open(flat, "wb") as out:
            for _ in range(windows // 1024):
                out.write(rng.integers(0, 50257, 1024 * WINDOW).astype(np.uint16).tobytes())
    if not records.exists():
        writer = ArrayRecordWriter(str(records), "group_size:1,uncompressed")
        ids = np.memmap(flat, np.uint16, "r").reshape(-1, WINDOW)
        for row in ids:
            writer.write(row.tobytes())
        writer.close()
    return flat, records


def readers(flat: Path, records: Path, windows: int) -> dict:
    """name -> function of window numbers [N] that returns uint16 [N, WINDOW]."""
    mapped = np.memmap(flat, np.uint16, "r").view(np.ndarray)
    file, source = (
        TokenFile(flat, np.dtype(np.uint16), windows * WINDOW),
        ArrayRecordDataSource([str(records)]),
    )

    def by_map(numbers):
        out = np.empty((len(numbers), WINDOW), np.uint16)
        for row, n in zip(out, numbers.tolist(), strict=False):
            row[:] = mapped[n * WINDOW : n * WINDOW + WINDOW]
        return out

    def by_place(numbers):
        out = np.empty((len(numbers), WINDOW), np.uint16)
        for row, n in zip(out, numbers.tolist(), strict=False):
            file.read(n * WINDOW, row)
        return out

    def one_record(numbers):
        return np.stack([np.frombuffer(source[n], np.uint16) for n in numbers.tolist()])

    def many_records(numbers):
        return np.stack(
            [np.frombuffer(raw, np.uint16) for raw in source.__getitems__(numbers.tolist())]
        )

    return {
        "memory map": by_map,
        "by place (preadv)": by_place,
        "ArrayRecord, one a call": one_record,
        "ArrayRecord, 64 a call": many_records,
    }


def drop(*paths: Path) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(read, windows: int, seconds: float, seed: int) -> float:
    """Windows a second, in batches of 64."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        read(permute(np.arange(done, done + 64) % windows, windows, seed, np.zeros(64, np.int64)))
        done += 64
    return done / (time.perf_counter() - began)


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--folder", type=Path, required=True)
    flags.add_argument("--gigabytes", type=float, default=2.0)
    flags.add_argument("--seconds", type=float, default=3.0)
    args = flags.parse_args()
    windows = int(args.gigabytes * 1e9 / 2 / WINDOW) // 1024 * 1024
    flat, records = make(args.folder, windows)
    probe = permute(np.arange(8), windows, 1, np.zeros(8, np.int64))
    answers = [read(probe).tolist() for read in readers(flat, records, windows).values()]
    assert all(answer == answers[0] for answer in answers)
    found = {name: {"cold": 0.0, "warm": 0.0} for name in readers(flat, records, windows)}
    for i, name in enumerate(found):
        drop(flat, records)
        found[name]["cold"] = rate(
            readers(flat, records, windows)[name], windows, args.seconds, 10 + i
        )
    for path in (flat, records):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    for _ in range(3):
        for name, read in readers(flat, records, windows).items():
            found[name]["warm"] = max(found[name]["warm"], rate(read, windows, args.seconds, 0))
    sizes = {"flat": flat.stat().st_size, "ArrayRecord": records.stat().st_size}
    result = {
        "windows per second": found,
        "bytes": sizes,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("| reader | cold, windows/s | warm, windows/s | warm, M tokens/s |\n|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['cold']:,.0f} | {row['warm']:,.0f} | "
            f"{row['warm'] * WINDOW / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
