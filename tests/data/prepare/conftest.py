"""The input of most tests of `gpt-jax prepare`."""

import pytest
from prepared import texts, write_jsonl


@pytest.fixture
def folder(tmp_path):
    """Two files of documents."""
    write_jsonl(tmp_path / "in/a.jsonl", texts(60, 1))
    write_jsonl(tmp_path / "in/b.jsonl", texts(40, 2))
    return tmp_path
