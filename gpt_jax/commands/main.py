"""`gpt-jax <command> …`: picks the command, imports only that one, and turns failures into exit codes."""

import importlib
import os
import sys
import traceback

from gpt_jax.errors import EXIT_CODES, Exit, PeerFailed, UsageError

COMMANDS = {
    "prepare": "raw text to token shards: read, filter, leave out copies, tokenize",
    "train": "train a model from a config, or resume it where its workdir stands",
    "evaluate": "loss, perplexity, bits per byte and accuracy of a checkpoint on text",
    "generate": "continue prompts from a checkpoint",
    "inspect": "the documents and the text of every row of a step of a run",
    "bench": "how fast the input pipeline of a config is by itself",
}


def usage() -> str:
    """What `gpt-jax --help` prints."""
    rows = [f"  {name:<10} {line}" for name, line in COMMANDS.items()]
    codes = [f"  {code:>3} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["usage: gpt-jax <command> [flags]      gpt-jax <command> --help", "", "commands", *rows, "",
                      "exit codes", *codes])


def run(arguments: list[str]) -> None:
    """Runs one command; raises Exit for every planned end but success."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    importlib.import_module(f"gpt_jax.commands.{name}").main(arguments[1:])


def _processes() -> int:
    """Processes of this job; 1 without asking JAX when no process group was made."""
    if "jax" not in sys.modules:
        return 1
    import jax
    return jax.process_count() if jax.distributed.is_initialized() else 1


def _lost_peer(error: Exception) -> bool:
    """Whether `error` comes of a peer process having left."""
    if _processes() == 1:
        return False
    from gpt_jax.stops import peer_gone

    return peer_gone(error)


def complain(line: str) -> None:
    """A line on standard error, if somebody still reads it."""
    try:
        print(f"gpt-jax: {line}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line for a planned end, a traceback for a bug, and the exit code either way."""
    code = 0
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except Exit as end:
        complain(str(end))
        code = end.code
    except KeyboardInterrupt:
        complain("interrupted; the last checkpoint is untouched")
        code = 130
    except BrokenPipeError:  # the reader of `generate | head` has gone; `train` goes on without one (make_say, BarWriter)
        sys.stdout = open(os.devnull, "w")
    except MemoryError as error:
        complain(f"out of memory ({error}); make the model, the batch or the rows smaller")
        code = UsageError.code
    except Exception as error:
        code = PeerFailed.code if _lost_peer(error) else 1
        if code == 1:
            traceback.print_exc()
        else:
            complain(f"a peer process is gone, its log has the reason; seen here as: {str(error).splitlines()[0]}")
    finish(code)


def finish(code: int) -> None:
    """Ends the process. Over several processes a normal exit would wait for the others in a barrier, for minutes when one
    of them has failed: leave at once."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except BrokenPipeError:
            setattr(sys, name, open(os.devnull, "w"))
    if code and _processes() > 1:
        os._exit(code)
    sys.exit(code)
