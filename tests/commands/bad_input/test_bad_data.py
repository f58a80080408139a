"""Data that cannot be trained on is refused in one line."""

import json
import lzma
import math

import pytest
import runs
from refusals import TEXT, on_data, refused

from gpt_jax.commands.config_file import load_config
from gpt_jax.data.tokenizers.spec import resolve_tokenizer
from gpt_jax.data.tokens.cache import prepare
from gpt_jax.train import CHECKPOINT_FOLDER
from gpt_jax.train.checkpoint import checkpoints

DATA = {
    "missing": ({}, ["none.txt"], ["config.data.path = ", "none.txt", "no such file"]),
    "no match": ({}, ["*.md"], ["*.md", "no file matches"]),
    "empty": ({"a.txt": b""}, ["a.txt"], ["a.txt", "no text in this file"]),
    "nothing usable": ({"a.exe": TEXT}, [""], ["no usable files", ".txt"]),
    "unreadable suffix": ({"a.exe": TEXT}, ["a.exe"], ["a.exe", "no usable files"]),
    "binary among text": (
        {"a.txt": TEXT * 99, "b.txt": TEXT + b"\x00\x01" + TEXT},
        [""],
        ["b.txt: byte 48 is NUL", "binary", "take it out"],
    ),
    "undecodable": (
        {"a.txt": TEXT, "b.txt": TEXT * 2 + b"\xff" + TEXT},
        [""],
        ["b.txt: not UTF-8 at byte 96 (0xff)", "--config.data.errors=replace"],
    ),
    "no json": (
        {"a.jsonl": b'{"text": "one"}\n{"text": \n'},
        ["a.jsonl"],
        ["a.jsonl:2", "not JSON"],
    ),
    "no such field": (
        {"a.jsonl": b'{"body": "one"}\n'},
        ["a.jsonl"],
        ["a.jsonl:1", "config.data.field = 'text'", "body"],
    ),
    "half a gzip file": (
        {"a.txt.gz": b"\x1f\x8b\x08\x00\x00\x00"},
        ["a.txt.gz"],
        ["a.txt.gz", "damaged or incomplete"],
    ),
    "a damaged later stream": (
        {"a.txt.xz": lzma.compress(TEXT * 99) + b"damaged" + lzma.compress(TEXT)},
        ["a.txt.xz"],
        ["a.txt.xz: a damaged or incomplete .xz file", "copy it again"],
    ),
    "smaller than a batch": (
        {"a.txt": TEXT * 5},
        ["a.txt"],
        [
            "config.train.batch_size = 8",
            "217 tokens",
            "6 rows",
            "config.train.seq_len = 32",
            "more text",
        ],
    ),
    "shorter than a row": (
        {"a.txt": b"too short to be"},
        ["a.txt"],
        ["config.train.seq_len = 32", "a row needs 33"],
    ),
    "one document by hash": (
        {"a.txt": TEXT * 99},
        ["a.txt", "--config.data.split=document"],
        ["config.data.split = 'document'", "two different documents"],
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(tmp_path, name):
    files, (path, *overrides), words = DATA[name]
    (tmp_path / "data").mkdir()
    for file, content in files.items():
        (tmp_path / "data" / file).write_bytes(content)
    refused(2, words, *on_data(tmp_path, path, *overrides))
    assert not list(tmp_path.glob("cache/*/meta.json")) or "seq_len" in " ".join(
        words
    )  # else nothing looks usable


def test_no_data_path(tmp_path):
    refused(
        2,
        ["config.data.path is empty", "name files"],
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
    )


def test_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    refused(
        2,
        ["config.data.cache", "choose a folder"],
        *runs.arguments(folder, tmp_path / "run", f"--config.data.cache={tmp_path}/file/cache"),
    )


def test_replacing_goes_on(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_bytes(TEXT * 20 + b"\xff" + TEXT * 20)
    runs.call(*on_data(tmp_path, "a.txt", "--config.data.errors=replace"))
    assert "1 undecodable places replaced" in capsys.readouterr().out
    assert checkpoints.latest_valid(tmp_path / "run" / CHECKPOINT_FOLDER) == 1


@pytest.mark.parametrize("packing", ["window", "chunk", "document", "first_fit", "best_fit"])
def test_documents_shorter_than_the_context(tmp_path, packing):
    """They share rows. Nothing is dropped, and the run is an ordinary one."""
    (tmp_path / "data").mkdir()
    texts = [f"short {i}" for i in range(100)]
    (tmp_path / "data/a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    command = on_data(tmp_path, "a.jsonl", f"--config.data.packing={packing}")
    runs.call(*command)
    config = load_config(runs.TINY, [text for text in command if text.startswith("--config.")])
    prepared = prepare(config.data, resolve_tokenizer(config.data.tokenizer), lambda line: None)
    pieces = [
        side.ids(a, b - 1)
        for side in (prepared.train, prepared.eval)
        for a, b in zip(side.offsets, side.offsets[1:], strict=False)
    ]
    assert [prepared.tokenizer.decode(ids) for ids in pieces] == texts
    assert runs.curve(tmp_path / "run")[1] == pytest.approx(math.log(264), abs=0.1)
