"""A workdir with checkpoints that tests of refusals read, or copy and damage."""

import shutil
from pathlib import Path

import pytest
import runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Holds the text and its token cache."""
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="session")
def trained(folder):
    """A workdir with whole checkpoints of steps 1 and 2, on bytes.

    Tests that damage it copy it first.
    """
    runs.call(
        *runs.arguments(
            folder,
            folder / "trained",
            "--config.train.steps=2",
            "--config.checkpoint.every_steps=1",
            "--config.eval.batches=1",
        )
    )
    return folder / "trained"


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the workdir, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
