"""What `gpt-jax prepare` refuses, in one line."""

import json
from pathlib import Path

import pytest
import runs
from prepared import documents, prepare, refused, texts, write_jsonl

from gpt_jax.commands.prepare import sort_inputs
from gpt_jax.data.prepare import identity, output
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError

BAD = {
    "nothing": ([], ["--input and --output"]),
    "no output": (["--input=x"], ["--input and --output"]),
    "no such input": (
        ["--input=nosuch.jsonl", "--output=out"],
        ["--input text", "nosuch.jsonl", "no such file"],
    ),
    "a store to write to": (
        ["--input=x", "--output=gs://b/c"],
        ["--output=gs://b/c", "local folder"],
    ),
    "unknown engine": (
        ["--input=x", "--output=out", "--engine=spark"],
        ["--engine=spark", "local, ray"],
    ),
    "all held out": (
        ["--input=x", "--output=out", "--eval_fraction=1"],
        ["--eval_fraction=1", "0.9"],
    ),
    "not a number": (["--input=x", "--output=out", "--piece_mb=nan"], ["--piece_mb=nan"]),
    "fewer than no workers": (["--input=x", "--output=out", "--workers=-1"], ["--workers=-1"]),
    "name of our own folder": (["--input=work=x", "--output=out"], ["'work'", "name of a source"]),
    "dedup": (
        ["--input=README.md", "--output=out", "--dedup=fuzzy"],
        ["--dedup=fuzzy", "near:SIMILARITY"],
    ),
    "similarity": (
        ["--input=README.md", "--output=out", "--dedup=near:7"],
        ["--dedup=near:7", "between 0 and 1"],
    ),
    "errors": (
        ["--input=x", "--output=out", "--errors=ignore"],
        ["--errors='ignore'", "strict, replace"],
    ),
    "encoding": (
        ["--input=x", "--output=out", "--encodings", "klingon"],
        ["--encodings='klingon'", "gb18030"],
    ),
    "on_error": (
        ["--input=x", "--output=out", "--on_error=bogus"],
        ["--on_error='bogus'", "stop, skip"],
    ),
    "documents": (
        ["--input=x", "--output=out", "--documents=page"],
        ["--documents='page'", "file, line"],
    ),
    "name that cannot be": (
        ["--input=my source=x", "--output=out"],
        ["'my source'", "name of a source", "letters"],
    ),
    "filter": (
        ["--input=README.md", "--output=out", "--filters=shorten"],
        ["--filters='shorten'", "min_chars:N"],
    ),
    "tokenizer": (
        ["--input=README.md", "--output=out", "--tokenizer=bpe:2"],
        ["--tokenizer", "bpe:2"],
    ),
    "two tasks": (["--inspect=a", "--verify=b"], ["--inspect=a", "alone"]),
    "unknown flag": (["--inputs=a"], ["--inputs", "--help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("some text")
    given, words = BAD[case]
    refused(2, words, *given)
    assert not Path("out").exists()


def test_folders_of_no_use(folder):
    given = f"--input={folder / 'in'}"
    refused(2, ("is not empty", "in"), given, f"--output={folder / 'in'}")
    (folder / "file").write_text("x")
    refused(2, ("is a file",), given, f"--output={folder / 'file'}")
    write_jsonl(folder / "empty.jsonl", ["", ""])
    refused(
        2,
        ("no text is left", "2 empty"),
        f"--input={folder / 'empty.jsonl'}",
        f"--output={folder / 'out'}",
    )


def test_filters_given_apart_add_up_and_output_inside_input_is_refused(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(30))
    given = f"--input={tmp_path / 'in'}"
    both = documents(
        prepare(tmp_path / "both", given, "--filters", "min_chars:100", "--filters=strip")
    )
    assert both["text"]["train"] == [text for text in texts(30) if len(text) >= 100]
    refused(2, ("--output=", "lies inside --input="), given, f"--output={tmp_path / 'in' / 'out'}")
    with pytest.raises(Exception, match="cannot be the name of a source"):
        prepare(tmp_path / "out", f"--input=corpus.json={tmp_path / 'in'}")


def test_a_path_that_looks_like_a_named_one_is_the_path_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("date=2024").mkdir()
    assert sort_inputs(["date=2024", "x=date=2024"]) == {
        "text": ("date=2024",),
        "x": ("date=2024",),
    }
    Path("2024").mkdir()
    with pytest.raises(UsageError, match=r"date=2024: both .* write ./date=2024 .* date=./2024"):
        sort_inputs(["date=2024"])
    wanted = {"text": ("./date=2024",), "date": ("./2024",)}
    assert sort_inputs(["./date=2024", "date=./2024"]) == wanted


def test_files_that_are_given_twice_are_named(tmp_path, capsys, monkeypatch):
    """They are named in one line, whatever their paths look like."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", texts(3, ord(name))) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    runs.call(
        "prepare",
        f"--input=wiki={paths[0]}",
        f"--input=wiki={paths[1]}",
        "--input",
        "a.jsonl",
        "b.jsonl",
        "--workers=1",
        f"--output={tmp_path / 'out'}",
    )
    said = (
        f"--input: {paths[0]} is given 2 times, and 1 more file: their documents are taken as often"
    )

    assert said in capsys.readouterr().err
    assert corpus.read_manifest(tmp_path / "out")["sources"].keys() == {"wiki", "text"}


@pytest.mark.parametrize("saved", [{"revisions": 5}, {"program": [1]}])
def test_settings_of_another_shape_are_damage(tmp_path, saved):
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps(saved))
    (work / "unit-00000.json").write_text("{}")
    assert identity.read_settings(tmp_path) == {}
    with pytest.raises(UsageError, match=r"settings\.json there is damaged"):
        output.begin(tmp_path, saved, print)
