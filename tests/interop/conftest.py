"""What tests of foreign directories share."""

import shutil
from pathlib import Path

import pytest
from goldens import GOLDENS


@pytest.fixture
def copy(tmp_path):
    """A function that copies a golden and returns its new directory."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(GOLDENS / name, tmp_path / name))

    return make
