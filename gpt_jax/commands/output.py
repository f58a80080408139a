"""What a command prints: lines for people, and output for programs."""

import contextlib
import os
import sys
from collections.abc import Callable

from gpt_jax.errors import UsageError, complain


@contextlib.contextmanager
def output():
    """For writing what a command is asked for: UsageError where standard output does not take
    it. `| head` is another matter: BrokenPipeError passes."""
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # else it is tried again at the end
        raise UsageError(
            f"standard output cannot be written ({error.strerror}); send it elsewhere"
        ) from None


def emit(text: str) -> None:
    """What a command is asked for, as a whole. Raises UsageError."""
    with output() as stream:
        print(text, file=stream, flush=True)


def make_say(stream) -> Callable[[str], None]:
    """Lines for people, from process 0 alone. A reader that has gone (`| head`), or a full disk,
    does not end what is being done."""
    import jax

    gone = jax.process_index() != 0

    def say(line: str) -> None:
        nonlocal gone
        if gone:
            return
        try:
            print(line, file=stream, flush=True)
        except OSError as error:
            gone = True
            if stream is sys.stdout:  # else Python complains about it at the end
                sys.stdout = open(os.devnull, "w")
                if not isinstance(error, BrokenPipeError):
                    complain(
                        f"standard output cannot be written ({error.strerror}): nothing more is said there"
                    )

    return say
