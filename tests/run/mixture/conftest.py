"""Prepared folders of a mixture, and a run on them."""

import pytest
import runs
from mixtures import arguments
from prepared import texts, write_jsonl


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three sources in two prepared folders, one of them filtered."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate(("wiki", "books", "chat")):
        rows = texts(150, seed)
        write_jsonl(
            root / f"{name}.jsonl", [text.upper() for text in rows] if name == "chat" else rows
        )
    (root / "both").mkdir()
    runs.call(
        "prepare",
        "--input",
        f"wiki={root / 'wiki.jsonl'}",
        f"books={root / 'books.jsonl'}",
        "--tokenizer=bytes+fim",
        "--eval_fraction=0.1",
        "--workers=1",
        "--filters",
        "min_chars:20",
        f"--output={root / 'both'}",
    )
    runs.call(
        "prepare",
        f"--input={root / 'chat.jsonl'}",
        "--tokenizer=bytes+fim",
        "--eval_fraction=0.1",
        "--workers=1",
        "--dedup=exact",
        f"--output={root / 'chat'}",
    )
    return root


@pytest.fixture(scope="session")
def whole(folder):
    """A run of one process that was never stopped."""
    process = runs.Process(
        folder / "logs", [*arguments(folder, folder / "whole"), "--cpu_devices=1"]
    )
    process.end(0)
    return folder / "whole"
