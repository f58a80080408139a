"""Requests to stop, and the watchdog that ends a run which hangs."""

import faulthandler
import os
import signal
import threading
import time
from contextlib import contextmanager

import jax

from gpt_jax.cluster.job import end_process
from gpt_jax.errors import Hang, complain


class StopRequest:
    """SIGTERM and SIGUSR1 as a question, asked after each step and at each batch of an evaluation.
    Over several processes JAX's preemption service makes all of them answer yes to the same one; it
    owns SIGTERM there, so SIGUSR1 is passed on as one. Once yes, always yes.

    What the service compares is a count of the questions and not the step: of a request before
    the first one the processes agree on number 1, and a resumed run never comes to that step
    again."""

    def __init__(self):
        self.seen, self.asked = False, 0
        self.shared = jax.process_count() > 1
        if self.shared:
            handlers = {signal.SIGUSR1: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), self._note)
        self._before = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }

    def _note(self, *_):
        self.seen = True

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """True when the run should save and stop. All processes ask equally often, at the same
        places."""
        self.asked += 1
        if self.shared and not self.seen:
            from jax.experimental import multihost_utils

            self.seen = multihost_utils.reached_preemption_sync_point(self.asked)
        return self.seen


@contextmanager
def watchdog(minutes: float):
    """Yields `beat()`; when it is not called for `minutes`, prints every thread's stack and ends
    the process with code 41. A thread of its own, since a hung collective never returns to
    Python. 0 minutes: off."""
    last, done = [time.monotonic()], threading.Event()

    def watch():
        while not done.wait(min(5.0, minutes * 15)):
            if time.monotonic() - last[0] > minutes * 60:
                complain(
                    f"no step ended for {minutes} minutes (config.train.hang_minutes); stacks follow"
                )
                faulthandler.dump_traceback()
                end_process(
                    Hang.code, f"no step ended for {minutes} minutes (config.train.hang_minutes)"
                )

    if minutes:
        threading.Thread(target=watch, daemon=True, name="watchdog").start()

    def beat():
        last[0] = time.monotonic()

    try:
        yield beat
    finally:
        done.set()
