"""A run for the commands that take a checkpoint, and a way to call them."""

import pytest
import runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Holds the text and its token cache."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="session")
def trained(folder):
    """A run on three axes of eight devices, which keeps steps 5 and 10."""
    runs.call(
        *runs.arguments(
            folder,
            folder / "run",
            "--config.train.steps=10",
            "--config.checkpoint.every_steps=5",
            "--config.eval.every_steps=5",
            "--config.mesh.data=2",
            "--config.mesh.fsdp=2",
            "--config.mesh.tensor=2",
        )
    )
    return folder / "run"


@pytest.fixture
def call(capsysbinary):
    """Runs a command line and returns (standard output, standard error)."""
    capsysbinary.readouterr()

    def run(*given) -> tuple[str, str]:
        runs.call(*given)
        out, err = capsysbinary.readouterr()
        return out.decode(), err.decode()

    return run
