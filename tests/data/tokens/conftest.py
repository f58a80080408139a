"""The text of the tests of the token cache, and a prepared folder with copies of it."""

import shutil
from pathlib import Path

import pytest
from cached_texts import WORDS
from prepared import prepare, texts, write_jsonl


@pytest.fixture
def folder(tmp_path):
    """Twelve texts in the folder `text`."""
    for i in range(12):
        (tmp_path / "text" / f"{i:02d}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"{i} " + WORDS * (i + 1))
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of two sources with several shards each."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = {"a": [*texts(80, 1), texts(1, 1)[0]], "b": ["long " * 500, *texts(40, 2)]}
    given = [f"{name}={write_jsonl(folder / f'{name}.jsonl', some)}" for name, some in rows.items()]
    return prepare(
        folder / "out",
        "--input",
        *given,
        "--eval_fraction=0.2",
        "--tokenizer=bpe:300",
        "--piece_mb=0.003",
    )


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))
