"""Files that stay open between reads: as many as help, and no more than the process may open."""

import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, ClassVar

from gpt_jax.files import allow_open_files, is_shortage

OPEN_FILES = 256  # open in a thread at once; more of them make no row faster


class Files:
    """The open files of a thread, the one that was used last at the end.

    They are known by an object and not by their path, where another file may lie by now.
    """

    def __init__(self):
        self.by_key: OrderedDict[object, BinaryIO] = OrderedDict()

    def open(self, key: object, path: Path) -> None:
        """Opens a file. If no more may be open, the others are closed first. Raises OSError."""
        try:
            self.by_key[key] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        except OSError as error:
            if not is_shortage(error):
                raise
            self.close_down_to(0)
            self.by_key[key] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below

    def close_down_to(self, count: int) -> None:
        """Closes those that were not used for longest, until `count` are open."""
        while len(self.by_key) > count:
            _, oldest = self.by_key.popitem(last=False)
            oldest.close()


class OpenFiles(threading.local):
    """The files that this thread used last: OPEN_FILES, or its part of what is allowed.

    All threads together may open a quarter of the limit of the process. They share it evenly. A
    thread that comes later has what the others have left, and at least one, until they give back.
    """

    # Of all threads that live.
    threads: ClassVar[weakref.WeakSet[Files]] = weakref.WeakSet()
    lock: ClassVar[threading.Lock] = threading.Lock()  # of `threads`

    def __init__(self):
        self.files = Files()
        self.allowed = 0  # files of all threads, known when the first one is opened
        with self.lock:
            self.threads.add(self.files)

    def open(self, key: object, path: Path) -> BinaryIO:
        """The open file that `key` stands for, opened at `path` the first time. Raises OSError."""
        self.allowed = self.allowed or allow_open_files() // 4
        by_key = self.files.by_key
        if key not in by_key:
            self.files.close_down_to(self._share() - 1)
            self.files.open(key, path)
        by_key.move_to_end(key)
        return by_key[key]

    def _share(self) -> int:
        """How many files this thread may have open now, at least one."""
        with self.lock:
            counts = [len(files.by_key) for files in self.threads]
        others = sum(counts) - len(self.files.by_key)
        even = self.allowed // len(counts)
        return max(1, min(OPEN_FILES, even, self.allowed - others))


OPENED = OpenFiles()
