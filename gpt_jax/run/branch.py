"""A branch of a run: a workdir of its own that goes on from one of the run's checkpoints."""

import json
import os
import shutil
from pathlib import Path

from gpt_jax.cluster import agree_on
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, write_file
from gpt_jax.run.lock import only_run
from gpt_jax.run.meta import META_SCHEMA
from gpt_jax.schema import Misfit, Schema, read_json
from gpt_jax.train import CHECKPOINT_FOLDER, resolve_checkpoint, steps_in

UNFINISHED = ".branching"  # the name of a copy that is not whole yet
ORIGIN = "branch.json"  # which run and step the branch was taken from
ORIGIN_SCHEMA: Schema = {"run": "text", "step": "count"}
METRICS = "metrics.jsonl"


def open_branch(workdir: Path, branch: Path, step: int, say) -> None:
    """Gives `branch` the checkpoint of `step` and the curve of the run in `workdir`.

    A step of 0 is the newest. The run itself is only read. Files are shared by hard links where the
    file system can, because nobody writes into a checkpoint that is complete. A branch that was
    taken from there before stays as it is. Process 0 does the work.

    Raises UsageError if the run has no such step, if the branch is the run itself or holds another
    run, or if it cannot be copied. Raises NoCheckpoint if the step is damaged.
    """
    if branch.resolve() == workdir.resolve():
        raise UsageError(f"--branch={branch}: is the run itself; give another folder")
    if agree_on(lambda: is_branch_of(branch, workdir, step)):
        say(f"{branch} is a branch already, and goes on")
        return

    directory, number = resolve_checkpoint(workdir, step, say, META_SCHEMA)

    def copy():
        try:
            copy_run(directory / str(number), workdir, branch)
        except shutil.Error as error:  # It lists all files that failed.
            raise refuse(error.args[0][0][2]) from None
        except OSError as error:
            raise refuse(describe_error(error)) from None

    def refuse(why: str) -> UsageError:
        return UsageError(
            f"--branch={branch}: step {number} of {workdir} cannot be copied ({why}); free space "
            "there, or name another folder"
        )

    with only_run(branch, say):
        agree_on(copy)
    say(f"{branch} goes on from step {number} of {workdir}")


def is_branch_of(branch: Path, workdir: Path, step: int) -> bool:
    """Whether `branch` was taken from this step of this run, and is whole.

    Raises UsageError if it holds another run, also one that has saved nothing yet.
    """
    is_whole = bool(steps_in(branch / CHECKPOINT_FOLDER))
    try:
        origin = read_json((branch / ORIGIN).read_bytes(), ORIGIN_SCHEMA)
    except (OSError, Misfit):
        if is_whole or any((branch / name).exists() for name in ("config.json", METRICS)):
            raise UsageError(
                f"--branch={branch}: holds a run, and no {ORIGIN} that says of which it is a "
                "branch; give another folder, or go on with it by --workdir"
            ) from None
        return False

    if origin["run"] != str(workdir.resolve()) or step not in (0, origin["step"]):
        raise UsageError(
            f"--branch={branch}: was taken from step {origin['step']} of {origin['run']}; give "
            "another folder, or go on with it by --workdir"
        )
    return is_whole


def copy_run(checkpoint: Path, workdir: Path, branch: Path) -> None:
    """Gives `branch` a checkpoint of the run in `workdir`, named by its step, and the curve.

    The checkpoint comes last, so that a branch that has one is whole.
    """
    target = branch / CHECKPOINT_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    origin = {"run": str(workdir.resolve()), "step": int(checkpoint.name)}
    write_file(branch / ORIGIN, json.dumps(origin).encode())
    if (workdir / METRICS).is_file():
        shutil.copyfile(workdir / METRICS, branch / METRICS)

    unfinished = target / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, copy_function=link_or_copy)
    unfinished.rename(target / checkpoint.name)


def link_or_copy(source: str, destination: str) -> None:
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source, destination)
    except OSError:  # Another disk, or a file system without links.
        shutil.copy2(source, destination)
