"""A folder of an object store: what lies there, and files to and from it.

A call that fails is tried again after a while, because a store or the network to it may be away for
some seconds. `file://` and `memory://` are stores as well; the latter lives in one process.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from gpt_jax.data import reaching
from gpt_jax.errors import Exit, UsageError

# fsspec opens more, but not all of that can be listed and written.
SCHEMES = ("gs", "gcs", "s3", "s3a", "az", "abfs", "oss", "file", "memory")
WAITS = (1.0, 4.0, 16.0)  # seconds before each further try
THREADS = 16  # files that travel at once
BLOCK = 1 << 22
# What another try would not change.
FINAL = (ImportError, ValueError, FileNotFoundError, PermissionError)


def check_scheme(field: str, url: str) -> None:
    """Raises UsageError if `url` names no folder of an object store."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{field}={url}: {scheme}:// is no object store; known are {known}")
    if not rest.strip("/"):
        raise UsageError(f"{field}={url}: names no folder; as in {scheme}://BUCKET/RUN")


def check_url(field: str, url: str) -> None:
    """Raises UsageError if `url` names no folder of a store, or if its package is missing here."""
    check_scheme(field, url)
    try:
        with reaching(url):
            url_to_fs(url)
    except UsageError as error:
        raise UsageError(f"{field}={error}") from None


class Store:
    """A folder of a store. Names are relative to it, with "/" between their parts.

    `say` gets a line for each call that is tried again. After the last try `failure` is raised.
    What another try would not change is a UsageError at once: a missing package, a bucket that does
    not exist, no permission.
    """

    def __init__(
        self, url: str, say: Callable[[str], None], failure: type[Exit] = UsageError
    ) -> None:
        self.url = url.rstrip("/")
        self._say = say
        self._failure = failure
        with reaching(url):
            self._files, root = url_to_fs(self.url)
        self._root = root.rstrip("/")

    def _try(self, name: str, work: Callable[[str], Any]) -> Any:
        """What `work(path)` gives for the path of `name`."""
        path = f"{self._root}/{name}".rstrip("/")
        for wait in (*WAITS, None):
            try:
                with reaching(f"{self.url}/{name}".rstrip("/")):
                    return work(path)
            except UsageError as error:
                if isinstance(error.__context__, FINAL):
                    raise
                if wait is None:
                    raise self._failure(str(error)) from None
                self._say(f"{error}; trying again in {wait:g} s")
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def list(self, below: str = "") -> dict[str, int]:
        """The bytes of every file of the folder `below`, by its name; {} if nothing is there."""

        def find(path: str) -> dict[str, int]:
            # A store keeps what it has listed before, and others write there too.
            self._files.invalidate_cache()
            found = self._files.find(path, detail=True)
            start = len(self._root) + 1
            return {name[start:]: int(facts.get("size") or 0) for name, facts in found.items()}

        return self._try(below, find)

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is no such file."""

        def cat(path: str) -> bytes | None:
            try:
                return self._files.cat_file(path)
            except FileNotFoundError:
                return None

        return self._try(name, cat)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file in the place of what is there."""

        def pipe(path: str) -> None:
            self._make_parent(path)
            self._files.pipe_file(path, content)

        self._try(name, pipe)

    def send(self, source: Path, name: str) -> None:
        """Copies a local file there."""

        def put(path: str) -> None:
            self._make_parent(path)
            self._files.put_file(str(source), path)

        self._try(name, put)

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to this machine. Raises OSError if the disk does not take it."""

        def get(path: str) -> OSError | None:
            with self._files.open(path, "rb") as remote, open(target, "wb") as file:
                while block := remote.read(BLOCK):
                    try:
                        file.write(block)
                    except OSError as error:
                        return error  # It is no fault of the store.
            return None

        problem = self._try(name, get)
        if problem is not None:
            raise problem

    def digest(self, name: str) -> str:
        """The SHA-256 of a file in hexadecimal, which is read through and not kept."""

        def read(path: str) -> str:
            sha256 = hashlib.sha256()
            with self._files.open(path, "rb") as remote:
                while block := remote.read(BLOCK):
                    sha256.update(block)
            return sha256.hexdigest()

        return self._try(name, read)

    def remove(self, name: str) -> None:
        """Deletes a file, which may be gone already."""

        def delete(path: str) -> None:
            try:
                self._files.rm_file(path)
            except FileNotFoundError:
                return

        self._try(name, delete)

    def drop_folder(self, name: str) -> None:
        """Deletes a folder whose files are gone, where the store has folders."""

        def delete(path: str) -> None:
            if self._files.isdir(path):
                self._files.rm(path, recursive=True)

        if "file" in self._files.protocol:
            self._try(name, delete)

    def _make_parent(self, path: str) -> None:
        # Other stores have no folders, and some would make a bucket.
        if "file" in self._files.protocol:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)


def in_threads(work: Callable[[str], Any], names) -> list:
    """`work(name)` of each name, THREADS at a time. Raises what the first failing one raises."""
    with ThreadPoolExecutor(THREADS, "store") as pool:
        tasks = [pool.submit(work, name) for name in names]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
