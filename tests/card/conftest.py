"""The fixture of the commands, for the command that makes a card."""

import pytest
import runs


@pytest.fixture
def call(capsysbinary):
    """Runs a command line and returns (standard output, standard error)."""

    def run(*given) -> tuple[str, str]:
        capsysbinary.readouterr()
        runs.call(*given)
        out, err = capsysbinary.readouterr()
        return out.decode(), err.decode()

    return run
