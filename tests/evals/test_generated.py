"""Answers that the model writes: when they match, and what is told of them."""

import json

import pytest
import subjects

from gpt_jax.errors import UsageError
from gpt_jax.evals.generated import normalize
from gpt_jax.evals.questions import answer_files, measure_questions

# After each byte of this text the next one is by far the likeliest.
TABLE = subjects.make_chain("the quick\n", subjects.draw_table())


def write(tmp_path, *rows) -> str:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "text, words",
    [
        (" The  Quick, brown\nfox!", "quick brown fox"),
        ("$1,234.50", "1234.50"),
        ("-5", "-5"),
        ("3.5", "3.5"),
        ("35", "35"),
        ("1, 2", "1 2"),
        ("x-ray", "x ray"),
        ("（北京）。", "北京"),
        ("ＡＢＣ", "abc"),
        (" + ", "+"),
        ("the", "the"),
    ],
)
def test_what_is_compared(text, words):
    assert normalize(text) == words


def test_answers_match_after_normalisation(tmp_path):
    rows = [
        {"context": "the", "reference": "The Quick!"},
        {"context": "the", "reference": "quack"},
        {"context": "th", "reference": ["no", "e quick"]},
        {"context": "the", "reference": "quick", "max_new_tokens": 3},
        {"context": "the", "reference": "qu", "max_new_tokens": 3},
        {"context": "the", "reference": "q", "stop": ["ui"]},
    ]
    path = write(tmp_path, *rows)
    subject = subjects.make_subject(TABLE)
    (task,) = answer_files(subject, [path], print, examples=6)
    assert [one.right[0] for one in task.answers] == [True, False, True, False, True, True]
    texts = [one.shown.options[0] for one in task.answers]
    assert texts == [" quick", " quick", "e quick", " qu", " qu", " q"]
    assert task.answers[2].shown.options[1:] == ["no", "e quick"]
    assert len({one.key for one in task.answers}) == 6
    found = measure_questions(subject, [path], print)
    assert found["eval/q/match"] == 4 / 6 and found["eval/q/questions"] == 6


def test_what_does_not_fit_is_told(tmp_path):
    """A context loses its beginning. A row that leaves no room for a prompt is left out."""
    path = write(
        tmp_path,
        {"context": "a" * 40 + "the", "reference": "quick"},
        {"context": "the", "reference": "quick", "max_new_tokens": 64},
        {"context": "the", "reference": "quick"},
    )
    said = []
    found = measure_questions(subjects.make_subject(TABLE), [path], said.append)
    assert found["eval/q/match"] == 1 and found["eval/q/questions"] == 2
    assert found["eval/q/cut"] == 1 and found["eval/q/left_out"] == 1
    assert said[0].startswith(f"1 of 3 questions of {path} do not fit the context of 64")
    assert said[1].startswith("1 of 2 prompts do not fit the context of 64 tokens, new ones")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"reference": " "}, "reference: expected a text, not empty"),
        ({"reference": []}, "reference: expected a text, or a list of texts, none of them empty"),
        ({"reference": ["a", 1]}, "reference: expected a text, or a list of texts"),
        ({"context": 1}, "context: expected a text"),
        ({"stop": "a"}, "stop: expected a list of texts, none of them empty"),
        ({"stop": [""]}, "stop: expected a list of texts, none of them empty"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected a whole number from 1"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
    ],
)
def test_rows_that_cannot_be(tmp_path, row, words):
    path = write(tmp_path, {"context": "a", "reference": "b"} | row)
    with pytest.raises(UsageError) as caught:
        measure_questions(subjects.make_subject(TABLE), [path], print)
    assert f"{path}, line 1: {words}" in str(caught.value)
