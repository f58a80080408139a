"""Exit codes, and the exceptions that carry them.

Every failure that a person or a scheduler has to tell apart is one row of `EXIT_CODES`. The program
turns an `Exit` into one line on standard error and its code. Any other exception is a bug, and
keeps its traceback.
"""

import os
import sys

EXIT_CODES = {
    0: "done",
    2: "config or usage: what was typed cannot be run as it is",
    10: "stopped on request, state saved",
    20: "data turned bad during the run",
    30: "training diverged",
    32: "the compiler gives wrong results on this machine, by a public report",
    40: "a peer process failed",
    41: "no progress within the time limit",
    42: "another run has the workdir",
    50: "saving a checkpoint failed",
    51: "no valid checkpoint",
}

# Every launcher starts the same command again after these codes, and the command then resumes. It
# stops after all others because a restart would repeat them: bad input, divergence, broken
# hardware, a bug (1).
RESTARTABLE = (10, 40, 41, 42, 50)
# Codes of a process that a signal has ended: 128 and the signal's number, as shells, SLURM and
# Kubernetes count. The process was killed for memory, lost its machine, or was asked to stop before
# it could listen. All of these are as good a reason to restart as 40.
SIGNALLED = (134, 135, 137, 138, 139, 143)  # ABRT BUS KILL USR1 SEGV TERM
# The wait before the first restart, and the longest one: it doubles in between.
RESTART_SECONDS = 5, 300


def mute(name: str) -> None:
    """Drops all that is written to `sys.stdout` or `sys.stderr` from now on.

    `name` is "stdout" or "stderr". A stream whose reader has gone, or whose disk is full, would
    otherwise fail once more when Python flushes it at the end.
    """
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process)
    setattr(sys, name, nowhere)


def escape(text) -> str:
    """`text` as one line. Characters that a terminal would obey or hide are escaped.

    A file's name may hold any of them, ends of lines and bytes that are no UTF-8 included.

    >>> escape("caf\\udce9\\n")
    'caf\\\\udce9\\\\n'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def plain(text) -> str:
    """What a file, a library or another machine says, as one line with single spaces."""
    return escape(" ".join(str(text).split()))


def complain(line: str) -> None:
    """Prints a line on standard error, and carries on where nobody takes it."""
    try:
        for part in line.split("\n"):
            print(f"gpt-jax: {escape(part)}", file=sys.stderr, flush=True)
    except OSError:
        mute("stderr")


def install_command(package: str) -> str:
    """The command that installs a package into this Python's environment, whatever the folder.

    launch/environment.sh leaves the versions that it took in the environment. They hold here too.
    """
    versions = os.path.join(sys.prefix, "constraints.txt")
    constraint = f" -c {versions}" if os.path.exists(versions) else ""
    return f"{sys.executable} -m pip install{constraint} '{package}'"


def restart_seconds(restarts: int) -> int:
    """Seconds to wait before restart number `restarts`, counted from 0."""
    first, most = RESTART_SECONDS
    return min(most, first * 2 ** min(restarts, 16))


class Exit(Exception):
    """A planned end of the program: `code` is a key of `EXIT_CODES`, the message one clear line.

    A message of several lines is given as several texts. Each is escaped, so that no name of a file
    adds a line to it.
    """

    code = 1

    def __init__(self, *lines: str):
        super().__init__(*map(escape, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class UsageError(Exit):
    """What the user typed cannot be run: names the field, the value and the way out."""

    code = 2


class Stopped(Exit):
    """The run stopped on request (SIGTERM, SIGUSR1), after saving."""

    code = 10


class DataError(Exit):
    """Data that was fine at the start turned bad during the run."""

    code = 20


class Diverged(Exit):
    """The loss or a gradient is no longer finite."""

    code = 30


class Miscompiled(Exit):
    """A program with a known result came out wrong: a fault of the compiler that was reported."""

    code = 32


class PeerFailed(Exit):
    """Another process of this job failed."""

    code = 40


class Hang(Exit):
    """No step finished within the time limit."""

    code = 41


class Busy(Exit):
    """Another run has the workdir. It may be the one before, which is about to end."""

    code = 42


class SaveFailed(Exit):
    """A checkpoint could not be written; the last good one is untouched."""

    code = 50


class NoCheckpoint(Exit):
    """No checkpoint could be restored and verified."""

    code = 51


EXIT_KINDS = {kind.code: kind for kind in Exit.__subclasses__()}


def exit_of(code: int, text: str) -> Exit:
    """The `Exit` that another process raised, made again of its code and text.

    A code that belongs to no `Exit` is a bug there, and gives PeerFailed here.
    """
    return EXIT_KINDS.get(code, PeerFailed)(*text.split("\n"))
