"""Requests to stop, and the watchdog that ends a run which hangs."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from gpt_jax.cluster.job import end_process
from gpt_jax.errors import Hang, complain


class StopRequest:
    """SIGTERM, SIGUSR1 and Ctrl-C as a question: should the run save and stop?

    A second Ctrl-C ends the run at once. The question is asked after each step and at each batch
    of an evaluation. After the first yes every answer is yes. Over several processes JAX's
    preemption service makes all of them answer yes to the same question. JAX handles SIGTERM in
    a job, so SIGUSR1 and Ctrl-C are turned into SIGTERM.

    The processes agree on a number, and stop at it. The number counts how often they have asked,
    not the training step. A step would not do. For a request that comes before the first question
    they agree on number 1, and a resumed run never reaches step 1 again.
    """

    def __init__(self):
        self.seen = False
        self.asked = 0
        self.shared = jax.process_count() > 1
        self.interrupted = False
        handlers: dict[int, Callable] = {signal.SIGUSR1: self._pass_on}
        if not self.shared:
            handlers = {signal.SIGTERM: self._note, signal.SIGUSR1: self._note}
        # A shell ignores Ctrl-C for what it starts in the background, and so does the run then.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            handlers[signal.SIGINT] = self._interrupt
        self._before = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }

    def _note(self, *_) -> None:
        self.seen = True

    def _pass_on(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _interrupt(self, number: int, _) -> None:
        self.interrupted = True
        signal.signal(number, self._before[number])
        if self.shared:
            self._pass_on()
        else:
            self._note()

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """True when the run should save and stop.

        All processes have to ask equally often, at the same places.
        """
        if self.interrupted:
            # A handler must not print, because it may interrupt a print.
            self.interrupted = False
            complain("Ctrl-C: stopping after this step; once more ends at once, and saves nothing")

        self.asked += 1
        if self.shared and not self.seen:
            from jax.experimental import multihost_utils

            self.seen = multihost_utils.reached_preemption_sync_point(self.asked)
        return self.seen


@contextmanager
def watchdog(minutes: float) -> Iterator[Callable[[], None]]:
    """Yields `beat()`, and ends the process with code 41 if it is not called for `minutes`.

    Every thread's stack is printed before. The watch is a thread of its own because a hung
    collective never returns to Python. 0 minutes turns it off.
    """
    last = time.monotonic()
    is_over = threading.Event()
    line = f"no step ended for {minutes} minutes (config.train.hang_minutes)"

    def beat() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not is_over.wait(min(5.0, minutes * 15)):
            if time.monotonic() - last > minutes * 60:
                complain(f"{line}; stacks follow")
                faulthandler.dump_traceback()
                end_process(Hang.code, line)

    if minutes:
        threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield beat
    finally:
        is_over.set()
