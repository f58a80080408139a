"""Files that are not on this machine's file system: object stores and whatever else fsspec opens
(called by sources, decoding and store).

A remote path is a str with `://`; a local one is a `Path`. `file://` and `memory://` work without
any store.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.core import url_to_fs

from gpt_jax.errors import UsageError

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
}  # what fsspec needs for a protocol


def is_remote(path: Path | str) -> bool:
    return isinstance(path, str) and "://" in path


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Every store has errors of its own (credentials, buckets, networks); all of them mean that
    `url` is of no use."""
    protocol = url.partition("://")[0]
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        package = PACKAGES.get(protocol)
        way = (
            f"needs the package {package}; pip install {package}"
            if package
            else f"needs a package: {error}"
        )
        raise UsageError(f"{url}: {protocol}:// {way}") from None
    except ValueError as error:
        raise UsageError(
            f"{url}: {error}; known are gs://, s3://, https:// and what else fsspec opens"
        ) from None
    except Exception as error:
        raise UsageError(f"{url}: cannot be reached: {type(error).__name__}: {error}") from None


class _File(io.RawIOBase):
    """A file of a store. Whatever the store says on the way is a UsageError: a time-out is no
    damage of the file, which would be left out for good."""

    def __init__(self, url: str, file: BinaryIO):
        self.url, self.file = url, file

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = (
                "timed out"
                if isinstance(error, TimeoutError)
                else f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
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
    """The file at `url`, seekable where the store allows ranges. UsageError when it cannot be
    opened or read."""
    with reaching(url):
        opened = fsspec.open(url, "rb")
        # One URL gives one file and no list of them, unlike what the inferred type says.
        return _File(url, opened.open())  # pyright: ignore[reportAttributeAccessIssue]


def open_binary(path: Path | str) -> io.RawIOBase | io.BufferedReader:
    """A local or a remote file to read; OSError for a local one, UsageError for a remote one
    that cannot be opened."""
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
    """All files below the folder `url`, as paths relative to it, sorted; hidden ones and those
    in hidden folders are left out, as in a local folder."""
    with reaching(url):
        files, folder = url_to_fs(url)
        found = [path[len(folder.rstrip("/")) + 1 :] for path in files.find(folder)]
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.split("/"))
    )


def glob(url: str) -> list[str]:
    """URLs of the files and folders that match, sorted."""
    with reaching(url):
        files, pattern = url_to_fs(url)
        return sorted(files.unstrip_protocol(path) for path in files.glob(pattern))


def stamp(url: str) -> tuple[int, str]:
    """(bytes of the file at `url`, what changes when it does, as the store has it)."""
    with reaching(url):
        files, path = url_to_fs(url)
        return int(files.size(path) or 0), str(files.ukey(path))
