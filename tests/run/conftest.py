"""No test of a run leaves a process behind."""

import pytest
import runs


@pytest.fixture(autouse=True)
def no_stragglers():
    """Ends the processes that a test has left."""
    yield
    runs.kill_all()
