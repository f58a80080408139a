"""What a command prints: lines for people, and output for programs."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from gpt_jax.errors import UsageError, complain, mute


@contextlib.contextmanager
def output() -> Iterator[TextIO]:
    """Standard output, for what a command is asked for.

    Raises UsageError where standard output does not take it. With `| head` the reader has gone,
    which is no mistake: BrokenPipeError passes.
    """
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        mute("stdout")  # else Python tries again at the end
        raise UsageError(
            f"standard output cannot be written ({error.strerror}); send it elsewhere"
        ) from None


def emit(text: str) -> None:
    """Prints what a command is asked for, as a whole. Raises UsageError."""
    with output() as stream:
        print(text, file=stream, flush=True)


def make_say(stream: TextIO) -> Callable[[str], None]:
    """A function that prints lines for people, from process 0 alone.

    A reader that has gone (`| head`), or a full disk, does not end what is being done.
    """
    import jax

    is_silent = jax.process_index() != 0

    def say(line: str) -> None:
        nonlocal is_silent
        if is_silent:
            return
        try:
            print(line, file=stream, flush=True)
        except OSError as error:
            is_silent = True
            if stream is not sys.stdout:
                return
            mute("stdout")  # else Python complains about it at the end
            if not isinstance(error, BrokenPipeError):
                complain(
                    f"standard output cannot be written ({error.strerror}): "
                    "nothing more is said there"
                )

    return say
