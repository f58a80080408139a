"""A folder that a command writes once and that belongs at a URL: made here, then sent."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax.data import is_remote
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.run.fetch import find_folder, writing
from gpt_jax.run.store import Store, check_url, in_threads
from gpt_jax.train import MANIFEST

# What tells a reader that a checkpoint, or a directory of Hugging Face, is whole.
LAST = (MANIFEST, "config.json")


@contextlib.contextmanager
def opening_target(path: str, mirror: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields the folder to write: `path`, or one below `mirror` that is sent to the URL `path`.

    Nothing is sent if an exception ends the block. The files of LAST are sent last, so nobody takes
    a part for the whole. What was sent is then deleted here.

    Raises UsageError if something lies at the URL, or if it cannot be used. Raises SaveFailed if
    the store does not take the files, which stay here.
    """
    if not is_remote(path):
        yield Path(path)
        return

    check_url("--to", path)
    if Store(path, say).list():
        raise UsageError(f"--to={path}: is there already; name a new folder")
    folder = find_folder(mirror, "sent", path)
    with writing(mirror, path):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed command left
        folder.parent.mkdir(parents=True, exist_ok=True)
    yield folder
    send_folder(folder, Store(path, say, SaveFailed))
    shutil.rmtree(folder.parent, ignore_errors=True)


def send_folder(folder: Path, store: Store) -> None:
    """Sends all files of a folder, those of LAST after the others. Raises SaveFailed."""
    files = [file for file in folder.rglob("*") if file.is_file()]

    def put(name: str) -> None:
        store.send(folder / name, name)

    try:
        for is_last in (False, True):
            own = [file for file in files if (file.name in LAST) == is_last]
            in_threads(put, sorted(file.relative_to(folder).as_posix() for file in own))
    except (SaveFailed, UsageError) as error:
        raise SaveFailed(
            f"--to={store.url}: could not be sent: {error}; it is whole in {folder}, to be copied "
            "from there"
        ) from None
