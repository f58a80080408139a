"""Where the time of a run goes, and metrics that are fetched one step late."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax


class OneStepLate:
    """Keeps a step's metrics on the device until the next step is dispatched.

    Reading them then stalls nothing, because the step is done by that time.
    """

    def __init__(self):
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, values) -> tuple[int, Any] | None:
        """Takes the metrics of `step`, and returns (step, host values) of the push before, or None.

        Call it right after dispatching the step. The copy to the host begins in the background.
        """
        for leaf in jax.tree.leaves(values):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        return self._replace((step, values))

    def flush(self) -> tuple[int, Any] | None:
        """Returns what is left. Call it before saving and at the end."""
        return self._replace(None)

    def _replace(self, values: tuple[int, Any] | None) -> tuple[int, Any] | None:
        late = self._waiting
        self._waiting = values
        if late is None:
            return None
        return late[0], jax.device_get(late[1])


PHASES = ("data", "step", "eval", "checkpoint", "compile", "sample", "log", "other")
LOOP = ("data", "step", "log", "other")  # what happens at every step


class Clock:
    """Wall time by phase: `with clock.phase("data", blocked=True): …`.

    Every moment since the start belongs to exactly one phase, "other" outside of any. A phase
    inside another takes its time from the outer one. `blocked` marks waiting for the device or for
    the input queue.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds = {(phase, blocked): 0.0 for phase in PHASES for blocked in (False, True)}
        self._stack = [("other", False)]
        self._since = now()

    def _settle(self) -> None:
        """Counts the time until now to the present phase."""
        moment = self._now()
        self._seconds[self._stack[-1]] += moment - self._since
        self._since = moment

    @contextlib.contextmanager
    def phase(self, name: str, blocked: bool = False) -> Iterator[None]:
        """Counts the time inside to phase `name`."""
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: choose one of {', '.join(PHASES)}")

        self._settle()
        self._stack.append((name, blocked))
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def fractions(self) -> dict[str, float]:
        """Each phase's part of the wall time. The parts sum to 1, or are all 0 at the start."""
        self._settle()
        total = self._sum_phases(PHASES)
        return {phase: self._sum_phases((phase,)) / (total or 1.0) for phase in PHASES}

    def loop_fractions(self) -> dict[str, float]:
        """Parts of the time of the loop, which is that of the LOOP phases.

        `host` is the loop's own overhead: time that is not blocked on device or data. `data_wait`
        is time blocked on the input queue, near 0 when input never starves the device.
        """
        self._settle()
        total = self._sum_phases(LOOP) or 1.0
        host = sum(self._seconds[phase, False] for phase in LOOP)
        return {"host": host / total, "data_wait": self._seconds["data", True] / total}

    def _sum_phases(self, phases) -> float:
        return sum(self._seconds[phase, blocked] for phase in phases for blocked in (False, True))

    def metrics(self) -> dict[str, float]:
        """All fractions under their metric names, `time/…`."""
        parts = self.fractions() | self.loop_fractions()
        return {f"time/{name}": part for name, part in parts.items()}
