"""Texts of object stores, copied to this machine while a cache is built from them.

A cache is keyed by the content of its text and built in several readings. Each text is read from
its store once: its copy is hashed while it is written, and the readings are those of the copy.
"""

import contextlib
import hashlib
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import Source, suffixes
from gpt_jax.errors import DataError, UsageError, escape
from gpt_jax.files import hold_lock


class Copy(NamedTuple):
    """A text on this machine."""

    path: Path
    sha256: str


class Copies:
    """The copies that this process has made. They lie in a folder of its own below the cache."""

    def __init__(self, root: Path):
        self.root = root
        self.folder: Path | None = None  # made with the first copy
        self.by_url: dict[str, Copy] = {}
        self.stack = contextlib.ExitStack()
        self.making = threading.Lock()  # threads fetch several texts at once

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *_) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            _locate_lock(self.folder).unlink(missing_ok=True)
        self.stack.close()

    def make_folder(self) -> Path:
        """The folder of the copies. Folders that killed processes have left are removed first."""
        with self.making:
            if self.folder is None:
                self.root.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(self.root)
                folder = self.root / f"copies-{uuid.uuid4().hex}"
                # The lock is held as long as the folder is there, so a free one means a leftover.
                self.stack.enter_context(hold_lock(_locate_lock(folder)))
                folder.mkdir()
                self.folder = folder
            return self.folder

    def fetch(self, url: str) -> Copy:
        """The copy of a text. Raises OSError, and UsageError for what store or network say."""
        if url not in self.by_url:
            name = hashlib.sha256(url.encode()).hexdigest()[:16]
            path = self.make_folder() / "".join([name, *(suffixes(url) or ())])
            digest = hashlib.sha256()
            with open(path, "wb") as file:
                for block in remote.read_blocks(url):
                    file.write(block)
                    digest.update(block)
            self.by_url[url] = Copy(path, digest.hexdigest())
        return self.by_url[url]

    def localize(self, sources: Sequence[Source], hashes: Sequence[str]) -> tuple[Source, ...]:
        """The sources, with a copy in the place of each remote file.

        Raises DataError for a copy that has another SHA-256 than `hashes` say.
        """
        local = []
        for source, sha256 in zip(sources, hashes, strict=True):
            if remote.is_remote(source.path):
                copy = self.fetch(str(source.path))
                if copy.sha256 != sha256:
                    raise DataError(f"{source.path}: changed while being read; start again")
                source = source._replace(path=copy.path)
            local.append(source)
        return tuple(local)

    @contextlib.contextmanager
    def name_urls(self) -> Iterator[None]:
        """Names the file of the store, and not its copy, in every refusal inside."""
        try:
            yield
        except (UsageError, DataError) as error:
            lines = list(error.args)
            for url, copy in self.by_url.items():
                lines = [line.replace(escape(copy.path), url) for line in lines]
            raise type(error)(*lines) from None


def _locate_lock(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _remove_leftovers(root: Path) -> None:
    """Removes folders of copies whose processes have ended without doing so."""
    for folder in root.glob("copies-*"):
        if folder.is_dir():
            with contextlib.suppress(BlockingIOError), hold_lock(_locate_lock(folder), wait=None):
                shutil.rmtree(folder, ignore_errors=True)
                _locate_lock(folder).unlink(missing_ok=True)
