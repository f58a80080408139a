"""Files that are not on this machine's file system: object stores and whatever else fsspec opens.

A remote path is a str with `://`, and a local one is a `Path`. `file://` and `memory://` work
without any store.
"""

import contextlib
import io
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec
from fsspec.core import url_to_fs

from gpt_jax.errors import UsageError, install_command, plain

# The package that fsspec needs for a protocol.
PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "oss": "ossfs",
}


# What stores call a text that changes with the content of a file.
CONTENT_TAGS = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Digest")
# A file that is younger may change again without another time.
SETTLED_SECONDS = 2.0
BLOCK = 1 << 22


def is_remote(path: Path | str) -> bool:
    return isinstance(path, str) and "://" in path


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turns every error inside into a UsageError that names `url`.

    Each store has errors of its own: credentials, buckets, networks.
    """
    protocol = url.partition("://")[0]
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        way = f"needs a package: {plain(error)}"
        if protocol in PACKAGES:
            package = PACKAGES[protocol]
            way = f"needs the package {package}; {install_command(package)}"
        raise UsageError(f"{url}: {protocol}:// {way}") from None
    except ValueError as error:
        raise UsageError(
            f"{url}: {plain(error)}; known are gs://, s3://, https:// and what else fsspec opens"
        ) from None
    except Exception as error:
        why = f"{type(error).__name__}: {plain(error)}"
        raise UsageError(f"{url}: cannot be reached: {why}") from None


class _File(io.RawIOBase):
    """A file of a store. Every error of the store is a UsageError.

    A time-out is therefore not taken for damage, for which a file can be left out for good.
    """

    def __init__(self, url: str, file: BinaryIO):
        self.url = url
        self.file = file

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {plain(error)}"
            if isinstance(error, TimeoutError):
                why = "timed out"
            raise UsageError(f"{self.url}: cannot be read: {why}; run the command again") from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def seek(self, *place: int) -> int:
        with self._reading():
            return self.file.seek(*place)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, out) -> int:
        with self._reading():
            block = self.file.read(len(out))
        out[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self.file.close()
        super().close()


def open_remote(url: str) -> io.RawIOBase:
    """The file at `url`, seekable if the store allows ranges.

    Raises UsageError if it cannot be opened or read.
    """
    with reaching(url):
        opened = fsspec.open(url, "rb")
        # One URL gives one file and no list of them, unlike what the inferred type says.
        return _File(url, opened.open())  # pyright: ignore[reportAttributeAccessIssue]


def open_binary(path: Path | str) -> io.RawIOBase | io.BufferedReader:
    """A local or a remote file to read.

    Raises OSError for a local file that cannot be opened, and UsageError for a remote one.
    """
    return open_remote(str(path)) if is_remote(path) else open(path, "rb")


def is_folder(url: str) -> bool:
    with reaching(url):
        files, path = url_to_fs(url)
        return files.isdir(path)


def exists(url: str) -> bool:
    with reaching(url):
        files, path = url_to_fs(url)
        return files.exists(path)


def walk(url: str) -> list[str]:
    """All files below the folder `url`, as sorted paths relative to it.

    As in a local folder, hidden files and those in hidden folders are left out.
    """
    with reaching(url):
        files, folder = url_to_fs(url)
        paths = [path[len(folder.rstrip("/")) + 1 :] for path in files.find(folder)]
    return sorted(
        path for path in paths if not any(part.startswith(".") for part in path.split("/"))
    )


def glob(url: str) -> list[str]:
    """URLs of the files and folders that match, sorted."""
    with reaching(url):
        files, pattern = url_to_fs(url)
        return sorted(files.unstrip_protocol(path) for path in files.glob(pattern))


class Version(NamedTuple):
    """What a store says of a file, without reading it."""

    size: int

    # A text that changes when the file does, as far as the store tells.
    stamp: str

    # Whether the stamp surely changes with the content. It does if the store gives a tag of the
    # content, or if the file is so old that no change can hide in the grain of a clock.
    sure: bool


def find_version(url: str) -> Version:
    """The version of the file at `url`. Raises UsageError if it cannot be reached."""
    with reaching(url):
        files, path = url_to_fs(url)
        facts = files.info(path)
        tags = [str(facts[key]) for key in CONTENT_TAGS if facts.get(key)]
        # Some stores, such as https://, have a key that never changes.
        stamp = " ".join([str(files.ukey(path)), *tags])
        sure = bool(tags) or _is_settled(files, path, facts)
        return Version(int(facts.get("size") or 0), stamp, sure)


def _is_settled(files, path: str, facts: dict) -> bool:
    """Whether the times of a file are known and older than SETTLED_SECONDS."""
    try:
        moments = [files.modified(path), facts.get("created") or 0]
        seconds = [x.timestamp() if isinstance(x, datetime) else float(x) for x in moments]
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return time.time() - max(seconds) > SETTLED_SECONDS


def stamp(url: str) -> tuple[int, str]:
    """(bytes of the file at `url`, a text of the store that changes when the file does)."""
    version = find_version(url)
    return version.size, version.stamp


def read_blocks(url: str) -> Iterator[bytes]:
    """The file at `url`, in blocks. Raises UsageError for whatever the store or network says."""
    with open_remote(url) as file:
        while True:
            with reaching(url):
                block = file.read(BLOCK)
            if not block:
                return
            yield block
