"""`gpt-jax <command> …`: picks the command and turns failures into exit codes.

Only the command that is called is imported.
"""

import importlib
import os
import sys
import traceback

from gpt_jax.commands.environment import find_fault
from gpt_jax.commands.stopping import ignore_requests
from gpt_jax.commands.uncaught import shorten_library_errors
from gpt_jax.errors import EXIT_CODES, Exit, PeerFailed, UsageError, complain, mute
from gpt_jax.files import describe_error

COMMANDS = {
    "prepare": "raw text to token shards: read, filter, leave out copies, tokenize",
    "train": "train a model from a config, or resume it where its workdir stands",
    "evaluate": "loss, perplexity, bits per byte and accuracy of a checkpoint on text",
    "classify": "the label of texts, by a checkpoint of a classification",
    "generate": "continue prompts from a checkpoint",
    "convert": "models of Hugging Face to checkpoints, and checkpoints to them",
    "plan": "whether a config fits on a machine that is not here, and how fast it could be",
    "card": "what a config can do, checked on a CPU and written on one page",
    "inspect": "the text of every row of a step of a run; the weights of a checkpoint",
    "bench": "how fast the input pipeline of a config is by itself",
    "launch": "start a job of several processes: on this machine, under SLURM, on Kubernetes",
}


def usage() -> str:
    """What `gpt-jax --help` prints."""
    rows = [f"  {name:<10} {line}" for name, line in COMMANDS.items()]
    codes = [f"  {code:>3} {meaning}" for code, meaning in EXIT_CODES.items()]
    usage_line = (
        "usage: gpt-jax <command> [flags]      gpt-jax <command> --help      gpt-jax --version"
    )
    return "\n".join([usage_line, "", "commands", *rows, "", "exit codes", *codes])


def run(arguments: list[str]) -> None:
    """Runs one command. Raises Exit for every planned end but success."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return

    if arguments[0] == "--version":
        from gpt_jax.cluster import code_version

        print(f"gpt_jax {code_version()}")
        return

    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    importlib.import_module(f"gpt_jax.commands.{name}").main(arguments[1:])


def _processes() -> int:
    """The processes of this job. Without JAX it is 1, and no device is opened for the answer."""
    if "jax" not in sys.modules:
        return 1
    from gpt_jax.cluster import group_size

    return group_size()


def _lost_peer(error: Exception) -> bool:
    """Whether `error` comes of a peer process having left."""
    if _processes() == 1:
        return False
    from gpt_jax.cluster import is_peer_gone

    return is_peer_gone(error)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program and ends the process.

    A planned end prints one line, and a bug its traceback. Both have an exit code.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # The caller has closed it (`>&-`).
            mute(name)
    shorten_library_errors()

    try:
        code, reason = run_to_end(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        ignore_requests()
        code = 130
        reason = "interrupted; checkpoints and what is finished are untouched"
        complain(reason)
    ignore_requests()
    finish(code, reason)


def run_to_end(arguments: list[str]) -> tuple[int, str]:
    """Runs one command. Returns the exit code and the reason for other processes."""
    try:
        run(arguments)
    except BrokenPipeError:
        # The reader of `generate | head` has gone. `train` carries on without one, see `make_say`.
        mute("stdout")
    except Exception as error:
        return explain(error)
    return 0, ""


def explain(error: Exception) -> tuple[int, str]:
    """Prints why the program ends, and returns the exit code and the reason for other processes."""
    if isinstance(error, Exit):
        code = error.code
        reason = str(error)
    elif isinstance(error, MemoryError):
        code = UsageError.code
        reason = f"out of memory ({error}); make the model, the batch or the rows smaller"
    elif _lost_peer(error):
        code, reason = _blame_peer(error)
    elif (fault := find_fault(error, os.environ)) is not None:
        code = UsageError.code
        reason = fault
    else:
        traceback.print_exception(error)
        what = f"{type(error).__name__}: {first_line(error)}"
        return 1, f"a bug there, the log has the traceback: {what}"
    complain(reason)
    return code, reason


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _blame_peer(error: Exception) -> tuple[int, str]:
    """Exit code and line for an error that comes of a peer having left.

    They are those that the peer gave, if it could give any.
    """
    from gpt_jax.cluster import JOBS

    failure = JOBS[0].failure(3.0) if JOBS else None
    if failure is not None:
        return failure.others_code, failure.line

    gone = JOBS[0].gone(4.0) if JOBS else "a peer process is gone without a word"
    return PeerFailed.code, (
        f"{gone} (killed, or its machine failed; its log may have the reason); "
        f"seen here as: {first_line(error)}"
    )


def finish(code: int, reason: str = "") -> None:
    """Ends the process.

    A failed process of several tells the others and leaves at once. A normal exit would wait for
    them in a barrier, for minutes when one of them has failed.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            mute(name)
            if name == "stdout" and not isinstance(error, BrokenPipeError):
                why = describe_error(error)
                line = f"standard output cannot be written ({why}); send it elsewhere"
                complain(line)
                code = code or UsageError.code
                reason = reason or line

    if code and _processes() > 1:
        from gpt_jax.cluster import end_process

        end_process(code, reason)
    sys.exit(code)
