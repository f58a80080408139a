"""Classification and translation as tasks, their options, and rows of tables."""

import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import runs
from prepared import documents, prepare, refused

from gpt_jax.commands.task_options import parse_task_options
from gpt_jax.data.read.decoding import Reading, Unreadable, field_text
from gpt_jax.data.tasks.example import Span
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError

LABELS = ("labels", '{"0": "bad", "1": "good"}')
MOOD = (LABELS, ("prompt", "{text} = "))


def read(row, task: str, *options):
    return field_text(row, Reading(task=task, task_options=options)).spans


# ---- rows ----


def test_classification_learns_the_words_of_the_label():
    wanted = (Span("fine {x} = ", False), Span("good"))
    for label in ("1", 1):
        assert read({"text": "fine {x}", "label": label}, "classify", *MOOD) == wanted
    flags = ("labels", '["false", "true"]'), ("prompt", "{a}/{b}?")
    spans = read({"a": "x", "b": "y", "label": True}, "classify", *flags)
    assert spans == (Span("x/y?", False), Span("true"))


def test_translation_learns_the_other_language():
    row = {"source": "Hi.", "zh": "嗨。"}
    options = ("target", "zh"), ("source_language", "English"), ("target_language", "Chinese")
    assert read(row, "translate", *options) == (
        Span("Translate English to Chinese: Hi.\n", False),
        Span("嗨。"),
    )
    options = ("target", "zh"), ("direction", "backward"), ("prompt", "{from}>{to} {text}=")
    assert read(row, "translate", *options) == (Span("zh>source 嗨。=", False), Span("Hi."))


@pytest.mark.parametrize(
    "row, task, options, words",
    [
        (
            {"body": "a", "label": "0"},
            "classify",
            MOOD,
            "'text' of --task=classify is missing; fie",
        ),
        (
            {"text": "a", "mood": "0"},
            "classify",
            MOOD,
            "label column 'label' .* fields there: text",
        ),
        (
            {"text": " ", "label": "0"},
            "classify",
            MOOD,
            "column 'text' of --task=classify is empty",
        ),
        ({"text": "a", "label": "2"}, "classify", MOOD, "holds '2'; labels are 0, 1"),
        ({"text": "a", "label": 0.5}, "classify", MOOD, "holds float, expected text"),
        (
            {"source": "a"},
            "translate",
            (),
            "target column 'target' .* is missing; fields there: so",
        ),
        ({"source": "", "target": "b"}, "translate", (), "source column 'source' .* is empty"),
        ({"source": "a", "target": "\n"}, "translate", (), "target column 'target' .* is empty"),
    ],
)
def test_rows_that_cannot_be_learned(row, task, options, words):
    with pytest.raises(Unreadable, match=words):
        read(row, task, *options)


@pytest.mark.parametrize(
    "task, options, words",
    [
        ("classify", (), "labels: is needed"),
        ("classify", (("labels", "0,1"),), "labels=0,1: is no JSON"),
        ("classify", (("labels", '["a"]'),), "expected two labels or more"),
        ("classify", (("labels", '{"0": "a", "1": "a"}'),), "each with its own words"),
        ("classify", (("labels", '{"0": 0}'),), "expected a JSON object of texts"),
        ("classify", (("labels", '{"0": "a", "0": "b", "1": "c"}'),), "'0' stands there twice"),
        ("classify", (LABELS, ("prompt", "x")), "holds no column"),
        ("classify", (LABELS, ("prompt", "{text} {label}")), "holds the column of the label"),
        ("classify", (LABELS, ("labal", "y")), "labal: is no option of this task; choose one of"),
        ("classify", (LABELS, LABELS), "labels: is given twice"),
        ("translate", (("direction", "both"),), "direction=both: choose one of forward, backward"),
        ("translate", (("prompt", "{source}"),), "expected {text}"),
        ("supervised", (("a", "b"),), "a: is no option of this task; this task has none"),
        ("plain", (("field", "b"),), "field: is no option of this task"),
    ],
)
def test_options_that_mean_nothing(task, options, words):
    with pytest.raises(UsageError, match=words) as error:
        Reading(task=task, task_options=options)
    assert str(error.value).startswith("task_options ")


def test_half_an_option_is_named_by_its_flag():
    given = "--input=a.csv", "--output=b", "--task=classify", "--task_options", "labels"
    code, line = runs.refusal("prepare", *given)
    assert code == 2 and line.startswith("--task_options labels: expected NAME=VALUE")


def test_options_are_typed_as_pairs():
    given = ["prompt=a\\n=b", 'labels={"0": "\\n"}']
    assert parse_task_options(given) == (("prompt", "a\n=b"), ("labels", '{"0": "\\n"}'))
    with pytest.raises(UsageError, match="--task_options labels: expected NAME=VALUE"):
        parse_task_options(["labels"])


# ---- tables ----

ROWS = [("fine film", "1"), ("dull, long", "0"), ("so so", "0")]
FLAGS = ("--task=classify", "--task_options", "prompt={text}=", f"labels={LABELS[1]}")


def write_table(folder, suffix: str):
    path = folder / f"rows.{suffix}"
    table = pyarrow.table(
        {"text": [text for text, _ in ROWS], "label": [int(label) for _, label in ROWS]}
    )
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif suffix == "arrow":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in ROWS))
    elif suffix == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS))
    else:
        path.write_text("label,text\n" + "".join(f'{b},"{a}"\n' for a, b in ROWS))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "arrow"])
def test_a_table_is_read_by_its_columns(tmp_path, suffix):
    out = prepare(tmp_path / "out", f"--input={write_table(tmp_path, suffix)}", *FLAGS)
    texts = ["fine film=good", "dull, long=bad", "so so=bad"]
    assert documents(out)["text"]["train"] == texts
    tokens = corpus.open_corpus(out).sources["text"]["train"]
    learned = corpus.read_manifest(out)["sources"]["text"]["train"]["learned"]
    # Of each text the word of its label and the end.
    assert learned == len("good bad bad".replace(" ", "")) + 3 < tokens.size
    settings = corpus.read_manifest(out)["settings"]
    assert settings["task_options"] == {"prompt": "{text}=", "labels": LABELS[1]}


def test_a_table_without_a_header_has_numbers(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in ROWS))
    flags = "--task=classify", "--task_options", "prompt={0}=", f"labels={LABELS[1]}", "label=1"
    out = prepare(tmp_path / "out", f"--input={path}", *flags)
    # The label of a table without a header is looked up by its number, too.
    assert documents(out)["text"]["train"][0] == "fine film=good"
    assert len(documents(out)["text"]["train"]) == 3


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "body,label\nx,1\n", "a.csv: the column 'text' of --task=classify is missing; c"),
        ("b.tsv", "text\tmood\nx\t1\n", "the column 'label' of --task=classify is missing; column"),
        ("c.csv", "text,text,label\nx,y,1\n", "c.csv: 2 columns have the name 'text'"),
        ("d.csv", "text,label\nx,1,2\n", "d.csv:2: has 3 columns and the first row 2"),
        ("e.tsv", "text\tlabel\nx\n", "e.tsv:2: has 1 columns and the first row 2"),
        ("f.csv", "text,label\n,1\n", "f.csv:2: the column 'text' of --task=classify is empty"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused(2, (words,), f"--input={tmp_path / name}", f"--output={tmp_path / 'out'}", *FLAGS)


def test_a_parquet_without_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "label": [1]}), path)
    words = "'text' of --task=classify is missing; columns there: body, label"
    refused(2, (words,), f"--input={path}", f"--output={tmp_path / 'out'}", *FLAGS)
