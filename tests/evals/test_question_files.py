"""Forms of published sets: one question in several forms has the same answers."""

import bz2
import csv
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import subjects

from gpt_jax.errors import UsageError
from gpt_jax.evals.question_files import find_questions, read_questions
from gpt_jax.evals.questions import answer_files, measure_questions, summarize_files

TABLE = subjects.draw_table()
QUERIES = [
    {"query": "Is it", "choices": ["so", "not"], "gold": 0},
    {"query": "Is not", "choices": ["a", "b"], "gold": 1},
    {"query": "Why?\n", "choices": ["cd", "e"], "gold": 1},
]
# What the same questions are in the plain form. No space follows a line break.
PLAIN = [
    {"context": "Is it", "choices": [" so", " not"], "gold": 0},
    {"context": "Is not", "choices": [" a", " b"], "gold": 1},
    {"context": "Why?\n", "choices": ["cd", "e"], "gold": 1},
]
HELLASWAG = "A man.\n1\nruns.\nsits.\nis.\nhas.\nA dog.\n3\nbarks.\nb.\nc.\nd.\n"
DATA = Path(os.environ.get("GPT_JAX_TEST_DATA") or "/nonexistent")


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path, rows, header=("", "Question", "A", "B", "C", "D", "Answer")) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def answer(*paths, **settings):
    """The answers of files, which must say nothing."""

    def refuse(line):
        raise AssertionError(line)

    return answer_files(subjects.make_subject(TABLE), paths, refuse, **settings)


def judge(path) -> tuple:
    """(metrics, [right by each metric]) of a file."""
    (task,) = answer(path)
    return task.metrics, [one.right for one in task.answers]


def test_choices_after_a_query(tmp_path):
    queries = judge(write(tmp_path / "query.jsonl", QUERIES))
    assert queries == judge(write(tmp_path / "plain.jsonl", PLAIN))
    bare = [row | {"choices": [choice.strip() for choice in row["choices"]]} for row in PLAIN]
    _, rows = read_questions(write(tmp_path / "bare.jsonl", bare))
    kind, asked = read_questions(str(tmp_path / "query.jsonl"))
    assert kind.ask(asked[0])[:2] == [("Is it", " so"), ("Is it", " not")]
    assert kind.ask(asked[2])[:2] == [("Why?\n", "cd"), ("Why?\n", "e")]
    assert kind.ask(rows[0])[0] == ("Is it", "so")


def test_a_last_word(tmp_path):
    """LAMBADA's form is an exact match with a space between."""
    path = write(tmp_path / "q.jsonl", [{"context": "the", "continuation": "quick"}])
    table = subjects.make_chain("the quick", TABLE)
    found = measure_questions(subjects.make_subject(table), [path], print)
    assert found["eval/q/exact_match"] == 1 and found["eval/q/questions"] == 1
    (task,) = answer_files(subjects.make_subject(table), [path], print, examples=1)
    shown = task.answers[0].shown
    assert shown.options == ["quick"] and shown.chosen is None and shown.shares[0] > 0.5


def test_one_continuation_after_several_contexts(tmp_path):
    rows = [
        {"context_options": ["He", "She"], "continuation": "ran", "gold": 0},
        {"context_options": ["a b", "a c"], "continuation": "d", "gold": 1},
    ]
    rows += [row | {"gold": 1 - row["gold"]} for row in rows]
    (task,) = answer(write(tmp_path / "q.jsonl", rows), examples=4)
    for row, one in zip(rows, task.answers, strict=True):
        totals = [
            subjects.read_off(TABLE, context, " " + row["continuation"])
            for context in row["context_options"]
        ]
        assert one.shown.values == pytest.approx(totals, rel=1e-4)
        assert one.right == (totals.index(max(totals)) == row["gold"],)
    assert task.metrics == ("acc",)


def test_six_lines_a_question(tmp_path):
    """The same as JSON lines, with the line ends of either system."""
    rows = [
        {"query": "A man.", "gold": 1, "choices": ["runs.", "sits.", "is.", "has."]},
        {"query": "A dog.", "gold": 3, "choices": ["barks.", "b.", "c.", "d."]},
    ]
    expected = judge(write(tmp_path / "rows.jsonl", rows))
    for name, text in {"a.txt": HELLASWAG, "b.txt": HELLASWAG.replace("\n", "\r\n")}.items():
        (tmp_path / name).write_bytes(text.encode())
        assert judge(tmp_path / name) == expected


def test_letters_of_a_table(tmp_path):
    path = write_csv(tmp_path / "q.csv", [[0, " 1,\n2? ", "a", "b ", "c", "d", "C"]])
    kind, rows = read_questions(path)
    context = "1,\n2?\nA. a\nB. b\nC. c\nD. d\n答案："
    assert rows == [{"context": context, "choices": ["A", "B", "C", "D"], "gold": 2}]
    assert kind.ask(rows[0])[3] == (context, "D")
    same = [dict(zip(("question", *"ABCD", "answer"), (" 1,\n2? ", *"abcd", "c"), strict=True))]
    assert read_questions(write(tmp_path / "same.jsonl", same))[1] == rows


def test_compressed_files(tmp_path):
    plain = Path(write(tmp_path / "q.jsonl", QUERIES))
    expected = judge(plain)
    for ending, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        packed = tmp_path / ("q.jsonl" + ending)
        packed.write_bytes(pack(plain.read_bytes()))
        assert judge(packed) == expected and answer(packed)[0].name == "q"
        packed.write_bytes(packed.read_bytes()[:-9])
        with pytest.raises(UsageError, match="cannot be read"):
            read_questions(str(packed))


def test_a_folder_is_asked_by_subject(tmp_path, monkeypatch):
    """Its rate is over all questions, and beside it stands the mean over subjects."""
    monkeypatch.setattr(subjects, "CONTEXT", 128)
    sizes = {"law": 2, "art": 7}
    for number, (name, size) in enumerate(sizes.items()):
        rows = [
            [i, f"{name} {i}", "a", "b", "c", "d", "ABCD"[(i + number) % 4]] for i in range(size)
        ]
        write_csv(tmp_path / "exam" / "test" / f"{name}.csv", rows)
        write_csv(tmp_path / "exam" / "dev" / f"{name}.csv", rows[:1])
    (tmp_path / "exam" / "test" / "notes.md").write_text("no questions")
    tasks = answer(tmp_path / "exam")
    assert [task.name for task in tasks] == ["exam/art", "exam/law"]
    summary = summarize_files(tasks)
    rights = [[one.right[0] for one in task.answers] for task in tasks]
    assert summary["exam/acc"] == sum(map(sum, rights)) / 9
    assert summary["exam/acc_by_subject"] == (sum(rights[0]) / 7 + sum(rights[1]) / 2) / 2
    assert summary["exam/subjects"] == 2 and summary["exam/questions"] == 9
    assert summary["exam/law/questions"] == 2
    alone = answer(tmp_path / "exam" / "test" / "law.csv")
    assert alone[0].answers == tasks[1].answers and alone[0].name == "law"
    assert len(answer(tmp_path / "exam", limit=1)[0].answers) == 1


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("q.jsonl", '{"query": "a", "answers": 1}', "line 1: has the columns query, answers; exp"),
        (
            "q.jsonl",
            json.dumps(QUERIES[0]) + '\n{"query": "a", "gold": 0, "options": []}',
            "line 2: has no choices; its columns are query, gold, options, and all rows",
        ),
        ("q.jsonl", '{"query": 1, "choices": ["a", "b"], "gold": 0}', "query: expected a text"),
        ("q.jsonl", '{"context": "a", "continuation": 1}', "continuation: expected a text"),
        ("q.jsonl", '{"context": 1, "continuation": "a"}', "context: expected a text"),
        (
            "q.jsonl",
            '{"context_options": ["a"], "continuation": "a", "gold": 0}',
            "context_options: expected a list of two texts",
        ),
        (
            "q.jsonl",
            '{"context_options": ["a", "b"], "continuation": " ", "gold": 0}',
            "continuation: expected a text, not empty",
        ),
        ("q.txt", HELLASWAG + "more\n", "has 13 lines; a text file has six a question"),
        ("q.txt", HELLASWAG.replace("3", "4"), "line 7: gold = 4: expected 0 to 3"),
        ("q.txt", HELLASWAG.replace("3", "x"), "line 7: gold = 'x': expected 0 to 3"),
        (
            "q.csv",
            "Question,A,B,C,Answer\na,b,c,d,A\n",
            "line 2: has the columns Question, A, B, C",
        ),
        (
            "q.csv",
            "Question,A,B,C,D,Answer\na,b,c,d,e,E\n",
            "line 2: answer = 'E': expected one of",
        ),
        ("q.csv", "Question,A,B,C,D,Answer\na,b,c,d\n", "line 2: d: expected a text, not empty"),
        ("q.csv", "Question,A,B,C,D,Answer\na,b,c,d,e,A,B\n", "line 2: has more cells than the"),
        ("q.csv", 'Question,A,B,C,D,Answer\n"a"x,b,c,d,e,A\n', "line 2: ',' expected"),
        ("q.csv", "", "has no rows"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_questions(str(path))
    assert str(caught.value).startswith(f"questions {path}") and words in str(caught.value)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(
        UsageError, match=r"has no file that ends in \.jsonl, \.csv, \.txt, nor has"
    ):
        find_questions([str(tmp_path)])
    for name in ("law.csv", "law.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="both would be named law; rename one"):
        find_questions([str(tmp_path)])


@pytest.mark.skipif(
    not (DATA / "evals").is_dir(),
    reason="no evaluation files: give GPT_JAX_TEST_DATA=DIR, where DIR/evals exists",
)
def test_published_files_can_be_read():
    counts = {"piqa.jsonl": 1838, "hellaswag_val_full.txt.bz2": 10042, "winograd_wsc.jsonl": 273}
    counts |= {"lambada_openai.jsonl.xz": 5153, "copa.jsonl": 100}
    for name, count in counts.items():
        assert len(read_questions(str(DATA / "evals" / name))[1]) == count
    (group,) = find_questions([str(DATA / "evals" / "cmmlu")])
    assert group.name == "cmmlu" and len(group.files) == 8
    for path in group.files.values():
        assert read_questions(path)[1]
