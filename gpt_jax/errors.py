"""Exit codes and the exceptions that carry them (floor 0, imported everywhere).

Every failure that a person or a scheduler has to tell apart is one row of `EXIT_CODES`.
`gpt_jax.commands` turns an `Exit` into one line on standard error and its code; anything else is a
bug and keeps its traceback.
"""

import os
import sys

EXIT_CODES = {
    0: "done",
    2: "config or usage: what was typed cannot be run as it is",
    10: "stopped on request, state saved",
    20: "data turned bad during the run",
    30: "training diverged",
    31: "hardware suspected",
    40: "a peer process failed",
    41: "no progress within the time limit",
    50: "saving a checkpoint failed",
    51: "no valid checkpoint",
}

# What every launcher does with a code: start the same command again, which resumes, or stop.
# Stopping is for what a restart repeats: bad input, divergence, broken hardware, a bug (1).
RESTARTABLE = (10, 40, 41, 50)
# A process that did not end by itself, as shells, SLURM and Kubernetes count: 128 and the signal.
# Killed for memory, with its machine, or asked to stop before it could listen: as good a reason to
# restart as 40.
SIGNALLED = (134, 135, 137, 138, 139, 143)  # ABRT BUS KILL USR1 SEGV TERM
RESTART_SECONDS = 5, 300  # before the first restart, and at most: the wait doubles in between


def complain(line: str) -> None:
    """A line on standard error, if somebody still reads it and its disk is not full: the exit
    code is said all the same."""
    try:
        for part in line.split("\n"):
            print(f"gpt-jax: {part}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")


def restart_seconds(restarts: int) -> int:
    """How long to wait before restart number `restarts` (0: the first)."""
    first, most = RESTART_SECONDS
    return min(most, first * 2 ** min(restarts, 16))


class Exit(Exception):
    """A planned end of the program: `code` is a key of `EXIT_CODES`, the message one clear line."""

    code = 1


class UsageError(Exit):
    """What the user typed cannot be run: names the field, the value and the way out."""

    code = 2


class Stopped(Exit):
    """Stopped on request (SIGTERM, SIGUSR1), after saving."""

    code = 10


class DataError(Exit):
    """Data that was fine at the start turned bad during the run."""

    code = 20


class Diverged(Exit):
    """The loss or a gradient is no longer finite."""

    code = 30


class PeerFailed(Exit):
    """Another process of this job failed."""

    code = 40


class Hang(Exit):
    """No step finished within the time limit."""

    code = 41


class SaveFailed(Exit):
    """A checkpoint could not be written; the last good one is untouched."""

    code = 50


class NoCheckpoint(Exit):
    """No checkpoint could be restored and verified."""

    code = 51


EXIT_KINDS = {kind.code: kind for kind in Exit.__subclasses__()}


def exit_of(code: int, text: str) -> Exit:
    """What another process raised, made again of its code and text; PeerFailed for a code of no
    Exit (a bug there)."""
    return EXIT_KINDS.get(code, PeerFailed)(text)
