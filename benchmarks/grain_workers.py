"""Grain's threads against Grain's worker processes, for the batches of this project.

    .venv/bin/python benchmarks/grain_workers.py [--rounds=5]

Both make the same batches of 64 rows of 1,024 tokens from this repository's pages. They run in
turn, and the median of the rounds is printed, with the time until the first batch and the state
that a checkpoint would have to hold.
"""

import argparse
import statistics
import time
from pathlib import Path

import grain
from absl import flags

from gpt_jax import config as configs
from gpt_jax.data import load_dataset, make_examples
from gpt_jax.data.stream.batches import ENDLESS, Batches

ROWS, LENGTH, BATCHES = 64, 1024, 200
PAGES = Path(__file__).resolve().parents[1] / "docs"


def make_iterator(batches: Batches, workers: int):
    """Two threads in this process, or so many worker processes with two threads each."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def measure(batches: Batches, workers: int) -> dict:
    """Seconds until the first batch, tokens a second after it, the state, and a sum of all ids."""
    iterator = make_iterator(batches, workers)
    began = time.perf_counter()
    next(iterator)
    first = time.perf_counter() - began

    began = time.perf_counter()
    total = sum(int(next(iterator)["tokens"].sum()) for _ in range(BATCHES))
    rate = BATCHES * ROWS * LENGTH / (time.perf_counter() - began)
    state = iterator.get_state()
    iterator.close()
    return {"first": first, "rate": rate, "state": state, "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    flags.FLAGS.mark_as_parsed()  # Grain's workers read flags of absl

    knobs = configs.Data(path=(str(PAGES),), tokenizer="bytes", eval_fraction=0.0)
    examples = make_examples(load_dataset(knobs, print), knobs, LENGTH, seed=0)
    sizes = configs.read_batch_sizes([(0, ROWS)])
    batches = Batches(examples.columns, sizes, lambda size: slice(0, ROWS), ENDLESS)

    results = {0: [], 2: []}
    for _ in range(rounds):
        for workers, seen in results.items():
            seen.append(measure(batches, workers))
    for workers, seen in results.items():
        name = f"{workers} worker processes" if workers else "2 threads"
        rate = statistics.median(one["rate"] for one in seen) / 1e6
        first = statistics.median(one["first"] for one in seen)
        print(f"{name}: {rate:.1f} M tokens/s, first batch after {first:.3f} s")
        print(f"    state {seen[-1]['state']}")
    assert len({one["total"] for seen in results.values() for one in seen}) == 1


if __name__ == "__main__":
    main()
