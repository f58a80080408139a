"""Which checkpoint of a run `gpt-jax evaluate` looks at next, and when there will be no more."""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from gpt_jax.errors import Exit, UsageError
from gpt_jax.files import is_locked

Say = Callable[[str], None]

# Between two looks for a new checkpoint.
POLL_SECONDS = 2.0
# A run that was stopped before its last step may be started again by its launcher. It counts as
# ended when nobody has held its workdir for so long.
RESTART_SECONDS = 60.0


class Next(NamedTuple):
    """What is to be done: evaluate a `step`, wait, or end. JSON values, to be sent to processes."""

    what: str  # step, wait or end
    directory: str = ""
    step: int = 0


class AllSteps:
    """The checkpoints that are whole at the first look, in order of their steps.

    `say` gets a line for each that is not.
    """

    def __init__(self, path: str, say: Say):
        self._path = path
        self._say = say
        self._left: list[Next] | None = None

    def find(self) -> Next:
        """The next one. Raises UsageError if there is no checkpoint."""
        if self._left is None:
            self._left = self._look()
        return self._left.pop(0) if self._left else Next("end")

    def _look(self) -> list[Next]:
        from gpt_jax.train import find_steps, steps_in

        directory, steps = find_steps(self._path)
        whole = list_whole(directory, steps)
        is_one = Path(self._path).absolute().parent == directory
        for step in steps if is_one else steps_in(directory):
            if step not in whole:
                self._say(
                    f"checkpoint step {step} in {directory} is not finished and is passed over"
                )
        return [Next("step", str(directory), step) for step in whole]


class Watch:
    """The checkpoints of a run in order of their steps, those to come included.

    The run has ended when nobody holds its workdir, and it is at its last step or was not started
    again within RESTART_SECONDS. If the file system has no locks, the last step ends it alone.
    Waiting for a next checkpoint ends after `most_minutes`, unless that is 0.
    """

    def __init__(self, path: str, most_minutes: float, say: Say):
        self._path = path
        self._most_seconds = most_minutes * 60
        self._say = say
        self._seen: set[int] = set()
        self._waiting: set[int] = set()  # those that were there at the last look, not yet given
        self._has_begun = False  # whether a run was seen at work, or a checkpoint
        self._told: set[str] = set()
        self._quiet_since = time.monotonic()
        self._free_since: float | None = None

    def find(self) -> Next:
        """Looks once. It never waits."""
        from gpt_jax.train import find_steps

        # The lock is looked at first: a run that ends between the two looks has saved by then.
        is_held = is_locked(find_workdir(self._path) / ".lock")
        try:
            directory, steps = find_steps(self._path)
        except UsageError:
            directory, steps = None, []
        whole = list_whole(directory, steps) if directory else []

        now = time.monotonic()
        coming = [step for step in whole if step not in self._seen]
        self._has_begun = self._has_begun or bool(whole or is_held)
        for step in sorted(self._waiting.difference(whole)):
            self._say(f"step {step} was deleted by its run before its turn came")
        self._waiting = set(coming[1:])
        if coming:
            self._seen.add(coming[0])
            self._quiet_since = now
            self._free_since = None
            return Next("step", str(directory), coming[0])

        end = self._describe_end(directory, whole, is_held, now)
        if end:
            self._say(end)
            return Next("end")
        return Next("wait")

    def _describe_end(
        self, directory: Path | None, whole: Collection[int], is_held: bool | None, now: float
    ) -> str:
        """Why no checkpoint will come, or "" if one may."""
        if self._most_seconds and now - self._quiet_since > self._most_seconds:
            return (
                f"no new checkpoint for --watch_minutes={self._most_seconds / 60:g}, so watching "
                "ends"
            )
        if not self._has_begun:
            self._tell_once(f"nothing in {self._path} yet; waiting for the first checkpoint")
            return ""

        last = max(whole, default=0)
        is_last = directory is not None and last > 0 and is_last_step(directory, last)
        if is_last and not is_held:
            return f"the run has finished at step {last}"
        if is_held is None:
            self._tell_once(
                f"{find_workdir(self._path)} has no lock that can be read: watching ends at the "
                "run's last step, or after --watch_minutes"
            )
            return ""
        if is_held:
            self._free_since = None
            return ""
        if self._free_since is None:
            self._free_since = now
        if now - self._free_since < RESTART_SECONDS:
            return ""
        return (
            f"the run has stopped at step {last}, before its last one: nobody has held its lock "
            f"for {RESTART_SECONDS:g} s"
        )

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def find_workdir(path: str) -> Path:
    """The workdir of a path that a user typed for --watch."""
    from gpt_jax.train import CHECKPOINT_FOLDER

    place = Path(path).absolute()
    return place.parent if place.name == CHECKPOINT_FOLDER else place


def list_whole(directory: Path, steps: Collection[int]) -> list[int]:
    """Those of `steps` that were saved to their end, in order."""
    from gpt_jax.train import MANIFEST

    return sorted(step for step in steps if (directory / str(step) / MANIFEST).exists())


def is_last_step(directory: Path, step: int) -> bool:
    """Whether a checkpoint is that of the last step of its own config."""
    from gpt_jax.run import META_SCHEMA
    from gpt_jax.train import read_meta

    try:
        meta = read_meta(directory, step, META_SCHEMA)
        return step >= meta["config"]["train"]["steps"]
    except (Exit, KeyError, TypeError):
        # It was deleted meanwhile, or cannot be read. Whoever evaluates it is told why.
        return False
