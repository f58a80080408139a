"""Command lines that the program must refuse, and a command line on given data."""

from pathlib import Path

import runs


def refused(code: int, words: tuple[str, ...], *given) -> str:
    """Runs the command line, which must end with `code`. One line must hold all `words`.

    A config may have several faults, and each has a line of its own.
    """
    ending, message = runs.refusal(*given)
    assert ending == code, message
    lines = message.split("\n")
    assert len(lines) == 1 or all(line.startswith("config.") for line in lines), message
    matches = [line for line in lines if all(word in line for word in words)]
    assert matches, message
    return matches[0]


TEXT = b"plain words, plain words, and more of the same.\n"


def on_data(tmp_path: Path, path: str, *overrides: str) -> list[str]:
    """A `train` of one step on a file in the folder `data`."""
    return [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
        f"--config.data.path={tmp_path}/data/{path}",
        f"--config.data.cache={tmp_path}/cache",
        "--config.log.progress=false",
        "--config.train.steps=1",
        "--config.optim.warmup_steps=0",
        "--config.eval.batches=1",
        *overrides,
    ]
