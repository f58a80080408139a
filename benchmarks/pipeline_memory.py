"""Memory of the input pipeline over a million batches: a mixture with a document mask.

    python benchmarks/pipeline_memory.py --sources "(('a','DIR',0.5),('b','DIR',0.5))" [--batches 1000000]

Batches are small (2 rows of 64 tokens), so that a million take a quarter of an hour. Prints the
resident memory of the process after 1,000 batches, 10,000, and every 100,000.
"""

import argparse
import ast
import time

from gpt_jax import config
from gpt_jax.data.stream import dataset
from gpt_jax.data.stream.batches import make_examples, make_stream


def resident() -> float:
    """MB of this process (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--sources", type=ast.literal_eval, required=True)
    flags.add_argument("--batches", type=int, default=1_000_000)
    args = flags.parse_args()
    knobs = config.Data(sources=args.sources, packing="best_fit", document_mask=True)
    stream = make_stream(make_examples(dataset.load_dataset(knobs), knobs, 64, 0), 2, slice(0, 2))
    began = time.perf_counter()
    for number in range(1, args.batches + 1):
        next(stream)
        if number in (1000, 10_000) or number % 100_000 == 0:
            print(
                f"{number:>9,} batches  {resident():.1f} MB  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    stream.close()


if __name__ == "__main__":
    main()
