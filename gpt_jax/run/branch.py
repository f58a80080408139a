"""A branch of a run: a workdir of its own that goes on from one of the run's checkpoints."""

import os
import shutil
from pathlib import Path

from gpt_jax.cluster import agree_on
from gpt_jax.errors import UsageError
from gpt_jax.run.meta import META_SCHEMA
from gpt_jax.train import CHECKPOINT_FOLDER, resolve_checkpoint

UNFINISHED = ".branching"  # the name of a copy that is not whole yet
METRICS = "metrics.jsonl"


def open_branch(workdir: Path, branch: Path, step: int, say) -> None:
    """Gives `branch` the checkpoint of `step` and the curve of the run in `workdir`.

    The run itself is only read. Files are shared by hard links where the file system can, because
    nobody writes into a checkpoint that is complete. A branch that has a checkpoint stays as it is.
    Process 0 does the work. Raises UsageError if the run has no such step, or if the branch is the
    run itself. Raises NoCheckpoint if the step is damaged.
    """
    if branch.resolve() == workdir.resolve():
        raise UsageError(f"--branch={branch}: is the run itself; give another folder")
    target = branch / CHECKPOINT_FOLDER
    if agree_on(lambda: any(path.name.isdecimal() for path in target.glob("*"))):
        say(f"{branch} is a branch already, and goes on")
        return

    directory, number = resolve_checkpoint(workdir, step, say, META_SCHEMA)

    def copy():
        target.mkdir(parents=True, exist_ok=True)
        unfinished = target / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(directory / str(number), unfinished, copy_function=link_or_copy)
        if (workdir / METRICS).is_file():
            shutil.copyfile(workdir / METRICS, branch / METRICS)
        unfinished.rename(target / str(number))

    agree_on(copy)
    say(f"{branch} goes on from step {number} of {workdir}")


def link_or_copy(source: str, destination: str) -> None:
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source, destination)
    except OSError:  # Another disk, or a file system without links.
        shutil.copy2(source, destination)
