"""The folder of this machine that a run with a URL for a workdir works in."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax.cluster import agree_on, exchange
from gpt_jax.errors import Busy, UsageError
from gpt_jax.files import describe_error, hold_lock
from gpt_jax.run.fetch import find_folder
from gpt_jax.run.lock import LOCK
from gpt_jax.run.store import check_url


def make_folder(url: str, mirror: str) -> Path:
    """The mirror's folder of a workdir at `url`, whose parent is made. Raises UsageError."""
    check_url("--workdir", url)
    folder = find_folder(mirror, "runs", url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"config.checkpoint.mirror = {mirror!r}: cannot be written: {describe_error(error)}"
        ) from None
    return folder


def check_shared(folder: Path, url: str) -> None:
    """Raises UsageError unless all processes of the job see one and the same folder.

    Orbax writes a checkpoint of several processes into one folder.
    """
    mark = f".seen-{os.getpid()}"

    def make() -> str:
        (folder.parent / mark).touch()
        return mark

    name = agree_on(make)
    seen = exchange({"seen": (folder.parent / name).exists()})
    agree_on(lambda: (folder.parent / mark).unlink())
    if not all(report["seen"] for report in seen):
        raise UsageError(
            f"--workdir={url}: the processes of this job do not share {folder.parent}; set "
            "config.checkpoint.mirror to a folder that all machines see"
        )


def list_locks(folder: Path, url: str) -> list[Path]:
    """What a run at `url` locks: its mirror, and a workdir on this machine that the URL names."""
    locks = [folder.parent / LOCK]
    scheme, _, path = url.partition("://")
    if scheme in ("file", "local"):
        Path(path).mkdir(parents=True, exist_ok=True)
        locks.append(Path(path) / LOCK)
    return locks


@contextlib.contextmanager
def holding(lock: Path, url: str, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs of this machine out of the mirror. Raises Busy."""
    with contextlib.ExitStack() as closing:
        try:
            closing.enter_context(hold_lock(lock, wait=None))
        except BlockingIOError:
            raise Busy(
                f"--workdir={url}: another run on this machine is training into it; wait for it, "
                "stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            say(f"{lock} cannot be locked: {describe_error(error)}")
        yield
