"""What a command prints: lines for people, and output for programs."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from gpt_jax.errors import UsageError, complain, escape, mute
from gpt_jax.files import describe_error


@contextlib.contextmanager
def output() -> Iterator[TextIO]:
    """Standard output, for what a command is asked for.

    Raises UsageError if standard output does not take it. Raises BrokenPipeError if its reader has
    gone, as with `| head`, because that is no mistake.
    """
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        mute("stdout")  # Otherwise Python tries again at the end.
        raise UsageError(
            f"standard output cannot be written ({describe_error(error)}); send it elsewhere"
        ) from None


def emit(text: str) -> None:
    """Prints what a command is asked for, as a whole. Raises UsageError."""
    with output() as stream:
        print(text, file=stream, flush=True)


def write_json(values, indent: int | None = None) -> str:
    """`values` as JSON in UTF-8.

    Halves of surrogate pairs are escaped. Names of files hold them for bytes that are no UTF-8.
    """
    text = json.dumps(values, ensure_ascii=False, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda half: ascii(half[0])[1:-1], text)


def make_say(stream: TextIO) -> Callable[[str], None]:
    """A function that prints lines for people, from process 0 alone.

    The work carries on if the reader has gone (`| head`), or if the disk is full.
    """
    import jax

    is_silent = jax.process_index() != 0

    def say(line: str) -> None:
        nonlocal is_silent
        if is_silent:
            return

        try:
            for part in line.split("\n"):
                print(escape(part), file=stream, flush=True)
        except OSError as error:
            is_silent = True
            if stream is not sys.stdout:
                return
            mute("stdout")  # Otherwise Python complains about it at the end.
            if not isinstance(error, BrokenPipeError):
                complain(
                    f"standard output cannot be written ({describe_error(error)}): "
                    "nothing more is said there"
                )

    return say
