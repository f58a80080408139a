"""When a run ends before its last step: requests to stop, the watchdog for hangs, and the signs that a peer process is
gone (floor 0; called by loop, checkpoint and commands)."""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager

import jax

from gpt_jax.errors import Hang, PeerFailed


# How the libraries below say that another process has left: gloo, NCCL, JAX's coordination service. What else goes wrong
# inside XLA (out of memory, say) is this process's own failure.
PEER_GONE = re.compile(r"Gloo .*failed|closed by peer|reset by peer|[Rr]emote process (has )?exited|heartbeat timeout|"
                       r"[Cc]oordination ?[Ss]ervice|Barrier failed|tasks are unhealthy")


def peer_gone(error: BaseException | None) -> bool:
    """Whether `error` comes of another process of this job having left."""
    return isinstance(error, PeerFailed) or (error is not None and jax.process_count() > 1
                                             and PEER_GONE.search(str(error)) is not None)


class StopRequest:
    """SIGTERM and SIGUSR1 as a question asked once a step. Over several processes JAX's preemption service makes all of
    them answer yes at the same step; it owns SIGTERM there, so SIGUSR1 is passed on as one."""

    def __init__(self):
        self.seen = False
        self.shared = jax.process_count() > 1
        if self.shared:
            handlers = {signal.SIGUSR1: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), self._note)
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _note(self, *_):
        self.seen = True

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, step: int) -> bool:
        """True when the run should save and stop after `step`."""
        if self.shared:
            from jax.experimental import multihost_utils
            return multihost_utils.reached_preemption_sync_point(step)
        return self.seen


@contextmanager
def watchdog(minutes: float):
    """Yields `beat()`; when it is not called for `minutes`, prints every thread's stack and ends the process with code 41.
    A thread of its own, since a hung collective never returns to Python. 0 minutes: off."""
    last, done = [time.monotonic()], threading.Event()

    def watch():
        while not done.wait(min(5.0, minutes * 15)):
            if time.monotonic() - last[0] > minutes * 60:
                print(f"gpt-jax: no step ended for {minutes} minutes (config.train.hang_minutes); stacks follow",
                      file=sys.stderr)
                faulthandler.dump_traceback()
                sys.stderr.flush()
                os._exit(Hang.code)

    if minutes:
        threading.Thread(target=watch, daemon=True, name="watchdog").start()

    def beat():
        last[0] = time.monotonic()

    try:
        yield beat
    finally:
        done.set()
