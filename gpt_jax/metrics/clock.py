"""Where the time of a run goes, and metrics that are fetched one step late."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax


class OneStepLate:
    """Holds a step's metrics on the device until the next step is dispatched, so that reading
    them stalls nothing. `push` right after dispatching step n returns (step, host values) of the
    push before, or None; it starts step n's copy to the host in the background. `flush` returns
    what is left: call it before saving and at the end."""

    _held = None

    def push(self, step: int, values) -> tuple[int, Any] | None:
        for leaf in jax.tree.leaves(values):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        return self._swap((step, values))

    def flush(self) -> tuple[int, Any] | None:
        return self._swap(None)

    def _swap(self, held) -> tuple[int, Any] | None:
        late, self._held = self._held, held
        return late and (late[0], jax.device_get(late[1]))


PHASES = ("data", "step", "eval", "checkpoint", "compile", "sample", "log", "other")
LOOP = ("data", "step", "log", "other")  # what happens at every step


class Clock:
    """Wall time by phase. `with clock.phase("data", blocked=True): …` counts the time to "data"
    and as waiting. Every moment since the start belongs to exactly one phase ("other" outside of
    any); a phase inside another takes its time from the outer one. `blocked` marks waiting for
    the device or for the input queue."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds = {(phase, blocked): 0.0 for phase in PHASES for blocked in (False, True)}
        self._stack = [("other", False)]
        self._since = now()

    def _settle(self) -> None:
        moment = self._now()
        self._seconds[self._stack[-1]] += moment - self._since
        self._since = moment

    @contextlib.contextmanager
    def phase(self, name: str, blocked: bool = False):
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
        """Part of the wall time of each phase; they sum to 1 (all 0 before any time has passed)."""
        self._settle()
        return self._parts(PHASES, {phase: ((phase, False), (phase, True)) for phase in PHASES})

    def loop_fractions(self) -> dict[str, float]:
        """Parts of the loop's time (LOOP phases). host: not blocked on device or data, its own
        overhead; data_wait: blocked on the input queue, near 0 when input never starves the
        device."""
        self._settle()
        return self._parts(
            LOOP, {"host": [(phase, False) for phase in LOOP], "data_wait": [("data", True)]}
        )

    def _parts(self, phases, parts) -> dict[str, float]:
        total = sum(self._seconds[phase, blocked] for phase in phases for blocked in (False, True))
        return {
            name: sum(self._seconds[key] for key in keys) / (total or 1.0)
            for name, keys in parts.items()
        }

    def metrics(self) -> dict[str, float]:
        """Both under their metric names, `time/…`."""
        return {
            f"time/{name}": part
            for name, part in {**self.fractions(), **self.loop_fractions()}.items()
        }
