"""Tasks for engines in tests.

They have a file of their own, so that a worker process need not import jax.
"""

import os
import signal
import time

from gpt_jax.errors import DataError


def square(item: int, tick) -> int:
    tick(1, item)
    return item * item


def slowly(text: str) -> str:
    """A filter that takes a millisecond, so that a job still works when a test sends its signal."""
    time.sleep(0.001)
    return text


def process(item: int, tick) -> int:
    return os.getpid()


def fail(item: int, tick) -> int:
    if item == 2:
        raise DataError("item 2 is bad")
    return item


def stumble(item: int, tick) -> int:
    return [][item]


def die(item: int, tick) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def native_threads(item: int, tick) -> int:
    """The number of threads that the tokenizers library starts to encode something."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    before = len(os.listdir("/proc/self/task"))
    library.encode_batch_fast(["a"] * 1000)
    return len(os.listdir("/proc/self/task")) - before


def linger(item: int, tick) -> None:
    tick(0, 0)
    time.sleep(10_000)
