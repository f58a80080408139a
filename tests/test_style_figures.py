"""The figures of style, counted on a small package by hand and by the program."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import style_figures
import style_source

SMALL = '''"""Adds. It is here (called by nobody), and this sentence has twelve words.

    an = example()  # no sentence
"""

from pack.low import thing  # noqa: F401


def work(a):  # A comment. With two sentences
    """Does it."""
    b, c = 1, f"{a}"
    b, c = c, b
'''
LONG_BODY = "".join(f"    x{n} = {n}\n" for n in range(12))


@pytest.fixture
def package(tmp_path):
    """A package of four rooms. The long body of `low` has no break, that of `high` a comment."""
    folder = tmp_path / "pack"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep/__init__.py").write_text("from .. import low\n")
    (folder / "low.py").write_text(f"def thing():\n{LONG_BODY}")
    (folder / "high.py").write_text(SMALL + "    # why\n" + LONG_BODY)
    (folder / "wide.py").write_text(f"key = lambda: {'1' * 100}\npair = 1, 2\n")
    return folder


def test_figures_by_hand(package):
    found = style_figures.measure(package)
    expected = {
        "files": 5,
        "code_lines": 1 + 13 + 16 + 2,  # deep, low, high, wide
        "functions": 2,
        "long_files": 0,
        "docstring_sentences": 3,
        "words_a_docstring_sentence": {"median": 2, "mean": 5.0},
        "derivable_docstrings": 1,
        "long_bodies": 2,
        "unbroken_bodies": 1,
        "unbroken_bodies_percent": 50.0,
        "wide_lines_percent": 3.1,
        "tuple_assignments": 2,
        "packed_assignments": 1,
        "named_lambdas": 1,
        "rooms": 4,
        "arrows": 2,
    }

    assert {key: found[key] for key in expected} == expected


def test_tokens_of_a_line(package):
    """An f-string is one token on every Python. Docstrings and comments are no tokens."""
    (source,) = [each for each in style_source.read_package(package) if each.path.stem == "high"]
    found = style_source.code_tokens(source)
    lines = {number: found[number] for number in (1, 6, 9, 10, 11)}
    assert lines == {1: 0, 6: 6, 9: 6, 10: 0, 11: 7}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two (three.) Four", ["One", "Two (three", "Four"]),
        ("As in e.g. this, 0.5 of it.", ["As in e.g. this, 0.5 of it."]),
        (
            "Begins\nand goes on\n- first\n  entry\n- second",
            ["Begins and goes on", "- first entry", "- second"],
        ),
        ("Prose:\n\n    code. code.\n\nMore", ["Prose:", "More"]),
        ("--- ===", []),
    ],
)
def test_sentences(text, expected):
    assert style_source.sentences(text) == expected


def test_every_figure_has_a_meaning(package):
    figures = style_figures.measure(package)
    assert list(figures) == list(style_figures.MEANINGS)
    assert len(style_figures.make_table(["pack"], [figures]).splitlines()) == 1 + len(figures)


def test_record_keeps_other_labels(package, monkeypatch, tmp_path):
    monkeypatch.setattr(style_figures, "RECORD", tmp_path / "figures.json")
    monkeypatch.setattr(style_figures, "read_commit", lambda folder: "abc")
    style_figures.record("before", package, {"files": 1})
    style_figures.record("after", package, {"files": 2})
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert {label: row["figures"]["files"] for label, row in kept.items()} == {
        "before": 1,
        "after": 2,
    }
    assert kept["before"]["commit"] == "abc"
