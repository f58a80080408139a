"""Python's garbage collector, kept out of the way of a run's steps.

A collection stops the process for up to a tenth of a second, and each process of a job at another
step, so that all of them wait for each. Here all collect at the same steps.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 100  # young objects
EVERYTHING = 10  # of so many collections one looks at all objects


@contextmanager
def collecting_by_step() -> Iterator[Callable[[int], None]]:
    """Turns automatic collections off. The function that it gives collects where a step is due.

    What exists at the first step that is due is never looked at again.
    """
    was_enabled = gc.isenabled()
    is_frozen = False

    def collect(step: int) -> None:
        nonlocal is_frozen
        if step % EVERY_STEPS:
            return
        is_full = step % (EVERY_STEPS * EVERYTHING) == 0
        gc.collect(2 if is_full or not is_frozen else 1)
        if not is_frozen:
            gc.freeze()
            is_frozen = True

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
