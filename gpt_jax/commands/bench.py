"""`gpt-jax bench`: how fast a part of a run is by itself."""

import resource
import time
from collections.abc import Callable

import numpy as np

from gpt_jax.commands.config_file import load_config
from gpt_jax.commands.flags import Flags, check_number
from gpt_jax.commands.output import emit

FAR_EXAMPLE = 10**9


def main(arguments: list[str]) -> None:
    """Raises UsageError for a config or data that cannot be used."""
    flags = Flags(
        prog="gpt-jax bench",
        description="The input pipeline of a config alone, without a model: tokens a "
        "second, and where the time goes. Of a ramp of batch sizes it measures the first, and "
        "it cuts no rows.",
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
    check_number("--batches", args.batches, 0)
    check_number("--seconds", args.seconds, 0.01, 1e6)

    config = load_config(args.config, rest)
    emit("\n".join(measure(config, args.batches, args.seconds)))


def timed(make: Callable[[int], object], count: int, seconds: float) -> tuple[int, float]:
    """Calls `make(n)` for n = 0, 1, … and returns (calls, seconds that they took).

    There are `count` calls. If `count` is 0, there are as many as `seconds` allow.
    """
    calls = 0
    began = time.perf_counter()
    while (calls < count) if count else (time.perf_counter() - began < seconds):
        make(calls)
        calls += 1
    return calls, time.perf_counter() - began


def measure(config, count: int, seconds: float) -> list[str]:
    """Lines: the stream from end to end, then its stages one after the other in this thread."""
    from gpt_jax.data import load_dataset, make_examples, make_stream
    from gpt_jax.run import read_start_tokenizer

    data = load_dataset(config.data, tokenizer=read_start_tokenizer(config))
    train = config.train
    size = train.batch_size

    began = time.perf_counter()
    examples = make_examples(data, config.data, train.seq_len, config.seed)
    stream = make_stream(examples, size, slice(0, size), 0, train.steps)
    lines = [*stream.summary, f"ready after {time.perf_counter() - began:.2f} s (rows planned)"]

    # A run that resumes there has no plan of rows yet.
    began = time.perf_counter()
    examples = make_examples(data, config.data, train.seq_len, config.seed)
    examples.columns(FAR_EXAMPLE + np.arange(size))
    lines.append(
        f"example {FAR_EXAMPLE:,} after {time.perf_counter() - began:.3f} s, rows planned anew"
    )

    lines.append(measure_stream(stream, config, count, seconds))
    return lines + measure_stages(examples, data.tokenizer, config, count, seconds / 4)


def measure_stream(stream, config, count: int, seconds: float) -> str:
    """A line about the whole stream, which is closed at the end."""

    def take(_):
        return next(stream)

    first = next(stream)
    token_bytes = sum(column.itemsize for column in first.values())
    timed(take, 0, min(1.0, seconds))  # The threads warm up.

    before = resource.getrusage(resource.RUSAGE_SELF)
    batches, wall = timed(take, count, seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    stream.close()

    size = config.train.batch_size
    seq_len = config.train.seq_len
    rate = batches * size * seq_len / wall
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = after.ru_maxrss / 1024
    growth = (after.ru_maxrss - before.ru_maxrss) / 1024
    return (
        f"stream: {rate / 1e6:.1f} M tokens/s, {rate * token_bytes / 1e6:,.0f} MB/s of columns; "
        f"{batches:,} batches of {size} x {seq_len} in {wall:.1f} s, {cpu / wall:.2f} cores, "
        f"{config.data.threads} threads; peak memory {peak:,.0f} MB (grew by {growth:,.1f})"
    )


def measure_stages(examples, tokenizer, config, count: int, seconds: float) -> list[str]:
    """A line about each stage of the stream, in one thread."""
    from gpt_jax.data import make_columns

    size = config.train.batch_size

    def indices(n):
        return np.arange(n * size, (n + 1) * size, dtype=np.int64)

    buffer = examples.fill(indices(0))
    stages = {
        "which rows": lambda n: examples.assign(indices(n)),
        "read and transform": lambda n: examples.fill(indices(n)),
        "columns": lambda n: make_columns(buffer, tokenizer.token_bytes, config.data.document_mask),
    }

    lines = []
    for name, stage in stages.items():
        calls, wall = timed(stage, count, seconds)
        rate = calls * size * config.train.seq_len / wall
        lines.append(
            f"  {name}: {wall / calls * 1e3:.3f} ms a batch, {rate / 1e6:.1f} M tokens/s "
            "in one thread"
        )
    return lines
