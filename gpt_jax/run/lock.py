"""One run at a time in a workdir."""

import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gpt_jax.cluster import agree_on
from gpt_jax.errors import Busy, UsageError
from gpt_jax.files import LinkedLock, describe_error, hold_lock
from gpt_jax.run.lease import LEASE, LEASE_SECONDS, is_held, read_lease

LOCK = ".lock"  # in the workdir

# Who looks whether a run is at work (`files.is_locked`) holds the lock for microseconds.
ATTEMPTS = 3
WAIT_SECONDS = 0.05


@contextmanager
def take(path: Path):
    """Holds the lock at `path`, after a few attempts. Raises BlockingIOError and OSError."""
    with ExitStack() as closing:
        for left in reversed(range(ATTEMPTS)):
            try:
                closing.enter_context(hold_lock(path, wait=None))
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(WAIT_SECONDS)
        yield


def refuse_lease(workdir: Path) -> None:
    """Raises Busy if a run is at work that has this folder as a URL, such as file://."""
    file = workdir / LEASE
    lease = read_lease(file.read_bytes() if file.is_file() else None)
    if lease and is_held(lease):
        raise Busy(
            f"--workdir={workdir}: another run is training into it by a URL (process "
            f"{lease['process']} on {lease['host']}); wait for it, stop it, or choose another "
            f"--workdir; the lease of a run that was killed ends after {LEASE_SECONDS:.0f} s"
        )


@contextmanager
def only_run(workdir: Path, say):
    """Holds the workdir for this run alone.

    Raises Busy on all processes if another run has it, and UsageError if its lock is a link.
    Launchers start again after Busy, because a run that has been told to stop, or has lost its
    launcher, keeps the workdir until it has saved.
    """
    with ExitStack() as closing:

        def take_lock():
            try:
                closing.enter_context(take(workdir / LOCK))
                refuse_lease(workdir)
            except BlockingIOError:
                raise Busy(
                    f"--workdir={workdir}: another run is training into it; wait for it, stop it, "
                    "or choose another --workdir"
                ) from None
            except LinkedLock as error:
                raise UsageError(f"--workdir={workdir}: {describe_error(error)}") from None
            except OSError as error:
                # Some file systems have no locks.
                say(
                    f"{workdir} cannot be locked ({describe_error(error)}): a second run in it "
                    "would not be noticed"
                )

        agree_on(take_lock)
        yield
