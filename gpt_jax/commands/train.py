"""`gpt-jax train`: trains from a config, or resumes the run in its workdir."""

import os
import shlex
import signal
import socket
import sys
import tempfile
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.cluster import code_version, format_start_line, tell_problems
from gpt_jax.commands.config_file import (
    DescribeConfig,
    PrintSchema,
    describe_overrides,
    find_workdir,
    load_config,
)
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit, make_say
from gpt_jax.commands.runtime import (
    add_runtime_flags,
    check_runtime,
    job_flags,
    leaving,
    start_runtime,
)
from gpt_jax.commands.stopping import ignore_requests
from gpt_jax.errors import UsageError, mute
from gpt_jax.files import describe_error


def main(arguments: list[str]) -> None:
    """Raises UsageError for what cannot be run.

    The run itself ends with Stopped, Diverged, DataError, SaveFailed or NoCheckpoint.
    """
    # Until the loop takes these signals there is nothing to save.
    leave = leaving(
        "stopped on request before the first step, nothing to save; the same command starts again"
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)

    args, rest = make_flags().parse_known_args(arguments)
    check_runtime(args)
    with tell_problems(job_flags(args), os.environ):
        config, workdir, profile = read(args, rest)
    if workdir is None:
        return

    # In a job of several processes, start_runtime leaves SIGTERM to JAX. JAX keeps a request, and
    # all processes stop together after the first step.
    if args.num_processes > 1 or args.distributed:
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    start_runtime(args)
    import jax

    from gpt_jax.run import build, open_branch, opening_workdir, run_training

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, leave)
    say = make_say(sys.stdout)
    if args.branch:
        branch = Path(make_workdir(args.branch, "--branch"))
        open_branch(Path(workdir), branch, args.from_step or 0, say)
        workdir = branch
    origin = {
        "command": shlex.join(["gpt-jax", "train", *arguments]),
        "preset": describe_overrides(args.config, rest),
    }
    with opening_workdir(workdir, config.checkpoint, say) as (folder, outlet, say):
        parts = build(config, say, folder)
        say_start(parts.mesh)
        try:
            run_training(parts, folder, profile, say, origin, outlet)
        finally:
            ignore_requests()  # There is nothing more to save, so they would only change the code.


def make_flags() -> Flags:
    """The flags of `gpt-jax train`. Every other argument is an override of the config."""
    flags = Flags(
        prog="gpt-jax train",
        description="Train from a config; the same command again resumes. Any field is set by "
        "--config.section.field=value, as in --config.optim.learning_rate=3e-4.",
    )
    flags.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="a file in configs/, and its variant"
    )
    flags.add_argument(
        "--workdir",
        help="where the run's files go, and where it resumes from: a folder, or a URL of an object "
        "store, as in gs://BUCKET/RUN",
    )
    flags.add_argument(
        "--print_config", action="store_true", help="print the resolved config as JSON and stop"
    )
    flags.add_argument(
        "--describe_config",
        nargs="?",
        const="",
        action=DescribeConfig,
        metavar="KEY",
        help="print what the fields of a config mean, or those of KEY, and stop; "
        "KEY=page makes docs/configs.md",
    )
    flags.add_argument(
        "--json_schema",
        nargs=0,
        action=PrintSchema,
        help="print the JSON schema of a config, and stop",
    )

    flags.add_argument(
        "--branch",
        metavar="DIR",
        help="go on in DIR from a checkpoint of --workdir, and leave the run there as it is",
    )
    flags.add_argument(
        "--from_step",
        type=int,
        metavar="N",
        help="the step that --branch goes on from; without it the newest",
    )
    flags.add_argument(
        "--profile", metavar="START:STOP", help="write a trace of these steps to WORKDIR/profile"
    )
    add_runtime_flags(flags)
    return flags


def say_start(mesh) -> None:
    """Prints every process's own line, and carries on where nobody takes it."""
    import jax

    from gpt_jax import sharding

    own = jax.local_devices()
    line = format_start_line(
        jax.process_index(),
        jax.process_count(),
        socket.gethostname(),
        len(own),
        own[0].device_kind,
        sharding.describe_places(mesh),
        code_version(),
    )
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # The reader has gone, as with `2>&1 | head`, or the disk is full.
        mute("stderr")


def read(args, rest: list[str]) -> tuple[configs.Config, Path | str | None, tuple[int, int] | None]:
    """Config, workdir and profiled steps of a command line. A workdir at a URL is a text.

    With --print_config it prints the config and returns None for the workdir. Raises UsageError.
    """
    config = load_config(args.config, rest)
    if args.print_config:
        from gpt_jax.run import take_model

        workdir = find_workdir(args.workdir) if args.workdir else None
        if isinstance(workdir, str) and config.init.model == "checkpoint":
            raise UsageError(
                f"--workdir={workdir}: is not read for --print_config; leave it out to print with "
                "the model of config.init.from"
            )
        resolved = configs.resolve(
            take_model(config, workdir if isinstance(workdir, Path) else None)
        )
        configs.check(resolved, configs.least_devices(config.mesh))
        emit(configs.to_json(resolved))
        return config, None, None
    if args.from_step is not None and (not args.branch or args.from_step < 1):
        raise UsageError(
            f"--from_step={args.from_step}: expected a step of --workdir, and --branch=DIR for "
            "what follows"
        )
    if not args.workdir:
        raise UsageError("--workdir is missing: where should the run's files go?")
    for flag, url in (("--workdir", args.workdir), ("--branch", args.branch or "")):
        if args.branch and "://" in url:
            raise UsageError(
                f"{flag}={url}: a branch needs folders of a file system, for the run and for the "
                "branch; start a new run from its weights with config.init.from"
            )
    profile = parse_profile(args.profile, config.train.steps) if args.profile else None
    return config, make_workdir(args.workdir), profile


def parse_profile(text: str, steps: int) -> tuple[int, int]:
    """ "10:20" -> (10, 20). Raises UsageError for steps that the run does not have."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop) <= steps):
        raise UsageError(
            f"--profile={text}: expected START:STOP with 1 <= START <= STOP <= {steps} steps"
        )
    return int(start), int(stop)


def make_workdir(text: str, flag: str = "--workdir") -> Path | str:
    """The workdir of a flag, which is made and can be written. Raises UsageError.

    A URL stays a text, and its store is looked at when the run opens it.
    """
    path = find_workdir(text)
    if isinstance(path, str):
        from gpt_jax.run import check_url

        check_url(flag, path)
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The file has a name of its own, because all processes of a job do this at once.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"{flag}={text}: cannot be written: {describe_error(error)}") from None
    return path
