"""What earlier starts of a run have left in the folder of its checkpoints."""

import shutil
from pathlib import Path

from gpt_jax import config
from gpt_jax.errors import SaveFailed
from gpt_jax.files import describe_error
from gpt_jax.schema import Each, read_json
from gpt_jax.train.checkpoint.manifest import META, SAVING, TEMPORARY, unfinished_in

# An old step is renamed before it is deleted, so that a kill never leaves half a checkpoint.
DELETED = ".deleted"


def sweep(directory: Path, report) -> None:
    """Removes unfinished saves and half-deleted steps, on process 0.

    It never touches a step that was complete once, unless the step was being deleted.
    """
    try:
        doomed = [path for end in (TEMPORARY, DELETED) for path in directory.glob(f"*{end}*")]
        for step in unfinished_in(directory):
            if (directory / str(step)).exists():
                doomed.append(directory / str(step))
            report(
                f"checkpoint step {step} in {directory} was not finished; its remains are removed"
            )

        for folder in doomed:
            shutil.rmtree(folder)
        for mark in directory.glob(f"*{SAVING}"):
            mark.unlink()
    except OSError as error:
        raise SaveFailed(
            f"{error.filename or directory}: cannot be removed: {describe_error(error)}"
        ) from error


def read_metric(directory: Path, step: int, policy: config.Checkpoint) -> float | None:
    """The saved value of `best_metric`, or None if the checkpoint has none or no readable meta."""
    try:
        raw = (directory / str(step) / META).read_bytes()
        return read_json(raw, {"metrics": Each("number")})["metrics"].get(policy.best_metric)
    except (OSError, ValueError):
        # A damaged step cannot be among the best. Whoever restores it is told why.
        return None
