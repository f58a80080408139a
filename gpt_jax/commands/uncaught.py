"""Errors that end threads of libraries: a line for each kind, and no traceback for each thread.

After a full disk the threads of a storage library fail one after the other, and dozens of their
tracebacks would hide the line that says what has happened.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax.errors import complain, plain

PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"


def is_ours(frames: traceback.StackSummary) -> bool:
    """Whether code of this package has taken part, so that the whole traceback is needed."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main or any(frame.filename.startswith(PACKAGE) for frame in frames)


def shorten_library_errors() -> None:
    """From now on an error that nobody catches in a thread of a library is one line.

    Each kind is told once. Errors of our own threads keep their tracebacks. `sys.unraisablehook`
    is where native code takes the errors of its threads.
    """
    told: set[tuple] = set()
    sys.unraisablehook = make_hook(sys.unraisablehook, told)
    threading.excepthook = make_hook(threading.excepthook, told)


def make_hook(print_whole: Callable[[Any], object], told: set[tuple]) -> Callable[[Any], None]:
    """A hook that prints a line where `print_whole` prints a traceback.

    `told` has the kinds that were printed, and gets this one.
    """

    def hook(args) -> None:
        frames = traceback.extract_tb(args.exc_traceback)
        if issubclass(args.exc_type, SystemExit) or is_ours(frames):
            print_whole(args)
            return

        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "native code"
        if (args.exc_type, place) in told:
            return
        told.add((args.exc_type, place))
        complain(
            f"a thread of a library ended with {args.exc_type.__name__}: {plain(args.exc_value)} "
            f"({plain(place)}); more of these are not printed"
        )

    return hook
