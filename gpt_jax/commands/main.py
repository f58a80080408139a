"""`gpt-jax <command> …`: picks the command, imports only that one, and turns failures into exit
codes."""

import importlib
import os
import sys
import traceback

from gpt_jax.errors import EXIT_CODES, Exit, PeerFailed, UsageError, complain

COMMANDS = {
    "prepare": "raw text to token shards: read, filter, leave out copies, tokenize",
    "train": "train a model from a config, or resume it where its workdir stands",
    "evaluate": "loss, perplexity, bits per byte and accuracy of a checkpoint on text",
    "generate": "continue prompts from a checkpoint",
    "plan": "whether a config fits on a machine that is not here, and how fast it could be",
    "inspect": "the documents and the text of every row of a step of a run",
    "bench": "how fast the input pipeline of a config is by itself",
    "launch": "start a job of several processes: on this machine, under SLURM, on Kubernetes",
}


def usage() -> str:
    """What `gpt-jax --help` prints."""
    rows = [f"  {name:<10} {line}" for name, line in COMMANDS.items()]
    codes = [f"  {code:>3} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(
        [
            "usage: gpt-jax <command> [flags]      gpt-jax <command> --help",
            "",
            "commands",
            *rows,
            "",
            "exit codes",
            *codes,
        ]
    )


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
    from gpt_jax.cluster import is_peer_gone

    return is_peer_gone(error)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line for a planned end, a traceback for a bug, and the exit code either
    way."""
    code, reason = 0, ""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except Exit as end:
        code, reason = end.code, str(end)
        complain(reason)
    except KeyboardInterrupt:
        code, reason = 130, "interrupted; checkpoints and what is finished are untouched"
        complain(reason)
    except (
        BrokenPipeError
    ):  # the reader of `generate | head` has gone; `train` goes on without (make_say, BarWriter)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    except MemoryError as error:
        code, reason = (
            UsageError.code,
            f"out of memory ({error}); make the model, the batch or the rows smaller",
        )
        complain(reason)
    except Exception as error:
        if _lost_peer(error):
            code, reason = _blame_peer(error)
            complain(reason)
        else:
            traceback.print_exc()
            code, reason = (
                1,
                f"a bug there, the log has the traceback: {type(error).__name__}: "
                f"{first_line(error)}",
            )
    finish(code, reason)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _blame_peer(error: Exception) -> tuple[int, str]:
    """Exit code and line for an error that comes of a peer having left: what that one said, if
    it could."""
    from gpt_jax.cluster import JOBS

    found = JOBS[0].failure(3.0) if JOBS else None
    if found is not None:
        return found.others_code, found.line
    gone = JOBS[0].gone(4.0) if JOBS else "a peer process is gone without a word"
    return PeerFailed.code, (
        f"{gone} (killed, or its machine failed; its log may have the reason); seen here as: "
        f"{first_line(error)}"
    )


def finish(code: int, reason: str = "") -> None:
    """Ends the process. Over several processes a normal exit would wait for the others in a
    barrier, for minutes when one of them has failed: tell them and leave."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
            if name == "stdout" and not isinstance(error, BrokenPipeError):
                said = f"standard output cannot be written ({error.strerror}); send it elsewhere"
                complain(said)
                code, reason = code or UsageError.code, reason or said
    if code and _processes() > 1:
        from gpt_jax.cluster import end_process

        end_process(code, reason)
    sys.exit(code)
