"""`gpt-jax bench`: how fast a part of a run is by itself."""

import resource
import time
from collections.abc import Callable

import numpy as np

from gpt_jax.commands.config_file import load_config
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.errors import UsageError


def main(arguments: list[str]) -> None:
    """Raises UsageError for a config or data that cannot be used."""
    flags = Flags(
        prog="gpt-jax bench",
        description="The input pipeline of a config alone, without a model: tokens a "
        "second, and where the time goes.",
    )
    flags.add_argument("what", choices=("data",), help="the part to measure")
    flags.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="a file in configs/, and its variant"
    )
    flags.add_argument(
        "--batches", type=int, default=0, help="how many to make; 0: as many as fit in --seconds"
    )
    flags.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    args, rest = flags.parse_known_args(arguments)
    if args.batches < 0 or not 0.01 <= args.seconds < 1e6:
        raise UsageError("--batches: expected 0 or more; --seconds: at least 0.01 and below 1e6")
    emit("\n".join(measure(load_config(args.config, rest), args.batches, args.seconds)))


def timed(make: Callable[[int], object], count: int, seconds: float) -> tuple[int, float]:
    """(calls, seconds) of `make(n)`: `count` times, or until the time is over."""
    began, n = time.perf_counter(), 0
    while (n < count) if count else (time.perf_counter() - began < seconds):
        make(n)
        n += 1
    return n, time.perf_counter() - began


def measure(config, count: int, seconds: float) -> list[str]:
    """Lines: the stream from end to end, then its stages one after the other in this thread."""
    from gpt_jax.data import load_dataset, make_columns, make_examples, make_stream

    data, knobs, train = load_dataset(config.data), config.data, config.train
    size, tokens = train.batch_size, train.batch_size * train.seq_len
    began = time.perf_counter()
    examples = make_examples(data, knobs, train.seq_len, config.seed)
    stream = make_stream(examples, size, slice(0, size), 0, train.steps)
    lines = [*stream.summary, f"ready after {time.perf_counter() - began:.2f} s (rows planned)"]

    # A run that resumes there has no plan of rows yet.
    began = time.perf_counter()
    examples = make_examples(data, knobs, train.seq_len, config.seed)
    examples.columns(10**9 + np.arange(size))
    lines.append(
        f"example 1,000,000,000 after {time.perf_counter() - began:.3f} s, rows planned anew"
    )
    first = next(stream)
    width = sum(column.itemsize for column in first.values())
    timed(lambda n: next(stream), 0, min(1.0, seconds))  # warm
    before = resource.getrusage(resource.RUSAGE_SELF)
    batches, wall = timed(lambda n: next(stream), count, seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    stream.close()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate = batches * tokens / wall
    lines.append(
        f"stream: {rate / 1e6:.1f} M tokens/s, {rate * width / 1e6:,.0f} MB/s of columns; "
        f"{batches:,} batches "
        f"of {size} x {train.seq_len} in {wall:.1f} s, {cpu / wall:.2f} cores, {knobs.threads} "
        "threads; peak "
        f"memory {after.ru_maxrss / 1024:,.0f} MB (grew by "
        f"{(after.ru_maxrss - before.ru_maxrss) / 1024:,.1f})"
    )

    def indices(n):
        return np.arange(n * size, (n + 1) * size, dtype=np.int64)

    stages = {
        "which rows": lambda n: examples.assign(indices(n)),
        "read and transform": lambda n: examples.fill(indices(n)),
    }
    buffer = examples.fill(indices(0))
    stages["columns"] = lambda n: make_columns(
        buffer, data.tokenizer.token_bytes, knobs.document_mask
    )
    for name, stage in stages.items():
        calls, wall = timed(stage, count, seconds / 4)
        lines.append(
            f"  {name}: {wall / calls * 1e3:.3f} ms a batch, {calls * tokens / wall / 1e6:.1f} M "
            "tokens/s in "
            "one thread"
        )
    return lines
