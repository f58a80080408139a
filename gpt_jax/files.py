"""Files that are whole or absent, their digests, locks between processes, and open files."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import resource
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Digest(NamedTuple):
    """A finished file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


def sync_file(file: BinaryIO) -> None:
    """Sends what was written to `file` through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sends the names in `folder` through to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> Digest:
    """Writes `path` through to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        sync_file(file)
    return Digest(len(content), hashlib.sha256(content).hexdigest())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which takes the place of `path` at the end.

    A reader sees the old file or the new one, never a part. A failure leaves the old file.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        # After a failure a full disk needs the room.
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> Digest:
    """Writes a whole file in the place of `path`, or leaves `path` alone.

    The name reaches the disk as well as the bytes. Raises OSError.
    """
    with replacing(path) as temporary:
        digest = write_file(temporary, content)
    sync_folder(path.parent)
    return digest


class LinkedLock(OSError):
    """A symbolic link lies where a lock belongs."""


@contextlib.contextmanager
def opening_lock(path: Path) -> Iterator[int]:
    """Yields a descriptor of `path` for `fcntl.flock`. The file is made if it is missing.

    The content of the file stays. Raises LinkedLock for a symbolic link, because it could lead to a
    file that is no lock. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            what = f"{path} is a symbolic link and no lock, so remove it"
            raise LinkedLock(error.errno, what) from None
        raise

    try:
        yield handle
    finally:
        # This gives the lock back, and so does the end of the process, however it ends.
        os.close(handle)


def free_name(path: Path) -> Path:
    """The first of `path`, `path.1`, `path.2`, … that does not exist."""
    names = (path if n == 0 else path.with_name(f"{path.name}.{n}") for n in range(1_000_000))
    return next(name for name in names if not name.exists())


def digest_file(path: Path) -> Digest:
    """Size and SHA-256 of a file's present content. Raises OSError."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(os.fstat(file.fileno()).st_size, sha256)


CHUNK_BYTES = 1 << 22


def hash_file(path: Path, tell: Callable[[int], None]) -> str:
    """The SHA-256 of a file in hexadecimal.

    `tell` gets the number of bytes after each chunk, and may raise to end the hashing. Raises
    OSError.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            tell(len(chunk))
    return digest.hexdigest()


def digest_json(*values) -> str:
    """20 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def is_inside(name: str) -> bool:
    """Whether a relative name, with "/" between its parts, stays below the folder it belongs to."""
    parts = name.split("/")
    is_plain = not any(part in ("", ".", "..") for part in parts)
    return is_plain and "\\" not in name and "\0" not in name


def _pass() -> None:
    """Says nothing of waiting."""


@contextlib.contextmanager
def hold_lock(path: Path, wait: Callable[[], None] | None = _pass) -> Iterator[None]:
    """Holds the lock of a file, which is made if need be and keeps its content.

    If another process holds it, `wait` is called before waiting. Without `wait` that raises
    BlockingIOError. Raises OSError for a file that cannot be opened, and LinkedLock for a link.
    """
    with opening_lock(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of a file, see `hold_lock`; None if that cannot be known.

    A file that is not there is not locked. The look holds the lock itself for a moment, shared with
    others who look, so `hold_lock` without `wait` may fail in that moment.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None

    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)


# More open files than any corpus needs at a time.
OPEN_FILES = 1 << 16


def allow_open_files() -> int:
    """Raises the soft limit of open files as far as the hard one and OPEN_FILES let, and gives it.

    The usual soft limit of 1,024 is for programs that use select, which this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return OPEN_FILES
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    # Some systems allow less than their hard limit says, and then the soft one stays.
    with contextlib.suppress(ValueError, OSError):
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], OPEN_FILES)


def is_shortage(error: Exception) -> bool:
    """Whether a file cannot be opened because too many are open."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def is_there(text: str) -> bool:
    """Whether a path exists, ~ expanded, or a glob matches something."""
    path = os.path.expanduser(text)
    return os.path.lexists(path) or bool(glob.has_magic(path) and glob.glob(path, recursive=True))


def describe_error(error: Exception) -> str:
    """What the system says in one line, and the way out where too many files are open."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    reason = said or type(error).__name__
    if not is_shortage(error):
        return reason
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: the limit is {limit:,}; raise it, as with ulimit -n 65536"
