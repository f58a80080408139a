"""CORE: prompts by the published rule, and scores that a table of probabilities gives by hand."""

import csv
import json
import lzma
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import subjects
import yaml

from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.evals import CoreSettings, core_prompts, find_core_mean, measure_core
from gpt_jax.evals.core import check_core, find_core_file, measure_core_task, read_rows
from gpt_jax.evals.core_mean import name_mean
from gpt_jax.evals.core_tasks import BY_NAME, CHOICE, CORE_TASKS, LANGUAGE, SCHEMA, CoreTask
from gpt_jax.evals.results import TaskResult

TABLE = subjects.draw_table()
RNG = np.random.default_rng(3)
DATA = Path(os.environ.get("GPT_JAX_TEST_DATA") or "/nonexistent")


def draw_word(size: int = 4) -> str:
    return "".join(map(chr, RNG.integers(97, 123, size)))


CHOICES = [
    {
        "query": draw_word(),
        "choices": [f"{draw_word(1)}ab", f"{draw_word(1)}abcd", f"{draw_word(1)}a"],
        "gold": int(RNG.integers(3)),
    }
    for _ in range(40)
]
SCHEMAS = [
    {
        # Their last letters differ, or more than the continuation would be shared.
        "context_options": [draw_word() + last for last in map(chr, 97 + RNG.permutation(26)[:2])],
        "continuation": draw_word(3),
        "gold": int(RNG.integers(2)),
    }
    for _ in range(40)
]
TEXTS = [{"context": f" {draw_word()}\n", "continuation": draw_word(1)} for _ in range(40)]


def write(folder: Path, task: str, rows, ending: str = "") -> Path:
    path = folder / (BY_NAME[task].file + ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_small(kind: str, shots: int = 0, delimiter: str = " ", baseline: float = 25) -> CoreTask:
    return CoreTask("small", kind, "small.jsonl", shots, delimiter, baseline)


def measure(tmp_path, task: CoreTask, rows, table=TABLE, said=None, limit=0) -> TaskResult:
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = CoreSettings(str(tmp_path), limit=limit, examples=len(rows))
    report = said.append if said is not None else print
    return measure_core_task(subjects.make_subject(table), task, path, settings, report)


def shuffle(rows) -> list:
    order = list(rows)
    random.Random(1337).shuffle(order)
    return order


# ---- prompts ----


def test_prompts_read_as_the_published_ones():
    """Blank lines divide examples, and white space around a context of one text is cut."""
    rows = [
        {"query": "Q1\n", "choices": ["a", "b"], "gold": 1},
        {"query": "Q2", "choices": ["c", "d"], "gold": 0},
    ]
    prompt = core_prompts.make_prompt(make_small(CHOICE, 1, "\nAnswer: "), rows, 0)
    before = "Q2\nAnswer: c\n\n"
    assert prompt.options == [before + "Q1\n\nAnswer: a", before + "Q1\n\nAnswer: b"]

    rows = [
        {"context_options": ["He", "She"], "continuation": "ran.", "gold": 1},
        {"context_options": ["It", "They"], "continuation": "sat.", "gold": 0},
    ]
    prompt = core_prompts.make_prompt(make_small(SCHEMA, 1), rows, 1)
    assert prompt.options == ["She ran.\n\nIt sat.", "She ran.\n\nThey sat."]

    rows = [{"context": " so\n", "continuation": "far"}, {"context": "as ", "continuation": "is"}]
    prompt = core_prompts.make_prompt(make_small(LANGUAGE, 1), rows, 0)
    assert prompt == (["as is\n\nso far"], "as is\n\nso")


@pytest.mark.parametrize("count, shots", [(11, 10), (12, 10), (400, 3)])
def test_examples_are_drawn_from_all_other_rows(count, shots):
    """The draw is that of a list without the row. Each row draws anew."""
    draws = []
    for number in range(count):
        others = [other for other in range(count) if other != number]
        expected = random.Random(1234 + number).sample(others, shots)
        assert core_prompts.draw_examples(number, count, shots) == expected
        draws.append(tuple(expected))
    assert len(set(draws)) == count


@pytest.mark.parametrize(
    "options, common",
    [(["abc", "abd"], 2), (["ab", "abc"], 1), (["ab", "ab"], 1), (["a", "b"], 0), (["ax", "a"], 0)],
)
def test_options_share_their_first_ids_but_the_last(options, common):
    ids = [list(map(ord, option)) for option in options]
    assert core_prompts.count_common(ids) == common


# ---- scores ----


def find_mean(text: str, start: int) -> float:
    """The mean log-probability of the bytes of `text` from `start` on."""
    ids = [256, *text.encode()]
    parts = [math.log(TABLE[a, b]) for a, b in zip(ids[start:], ids[start + 1 :], strict=False)]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_compared_by_the_mean_of_their_tokens(tmp_path, monkeypatch, shots):
    monkeypatch.setattr(subjects, "CONTEXT", 128)
    task = make_small(CHOICE, shots, "\nAnswer: ")
    found = measure(tmp_path, task, CHOICES)
    rows = shuffle(CHOICES)
    right = []
    means = []
    for number, row in enumerate(rows):
        texts = core_prompts.make_prompt(task, rows, number).options
        start = next(i for i in range(len(texts[0])) if len({text[i] for text in texts}) > 1)
        means.append([find_mean(text, start) for text in texts])
        right.append(int(np.argmax(means[-1])) == row["gold"])
    assert [answer.right[0] for answer in found.answers] == right and 0 < sum(right) < len(right)
    shown = found.answers[0].shown
    assert shown.context == rows[0]["query"] and list(shown.options) == rows[0]["choices"]
    assert (shown.chosen == shown.gold) == right[0] and sum(shown.shares) == pytest.approx(1)
    assert shown.values == pytest.approx(means[0], rel=1e-4)


def test_contexts_are_compared_by_one_continuation(tmp_path):
    """The bytes that both end with are scored, the space before the continuation among them."""
    found = measure(tmp_path, make_small(SCHEMA), SCHEMAS)
    right = []
    chosen = set()
    for row in shuffle(SCHEMAS):
        tail = f" {row['continuation']}"
        texts = [context + tail for context in row["context_options"]]
        means = [find_mean(text, len(text) - len(tail)) for text in texts]
        chosen.add(int(np.argmax(means)))
        right.append(int(np.argmax(means)) == row["gold"])
    assert [answer.right[0] for answer in found.answers] == right and chosen == {0, 1}


def test_a_continuation_is_right_if_each_token_is_the_likeliest(tmp_path):
    rows = [*TEXTS, {"context": "the", "continuation": "quick"}]
    table = subjects.make_chain("the quick", TABLE)
    # The last byte of a context is followed by the space, and that by the continuation.
    found = measure(tmp_path, make_small(LANGUAGE), rows, table)
    expected = []
    for row in shuffle(rows):
        ids = [*(row["context"].strip() + " " + row["continuation"]).encode()]
        start = len(row["context"].strip())
        pairs = zip(ids[start - 1 :], ids[start:], strict=False)
        expected.append(all(table[a].argmax() == b for a, b in pairs))
    assert [answer.right[0] for answer in found.answers] == expected
    assert sum(expected) >= 1
    sure = next(a for a, row in zip(found.answers, shuffle(rows), strict=True) if row == rows[-1])
    own = sum(math.log(table[a, b]) for a, b in zip(b"e quic", b" quick", strict=True))
    assert sure.shown.values[0] == pytest.approx(own, rel=1e-4) and sure.shown.chosen is None


def test_a_limit_changes_no_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "CONTEXT", 128)
    task = make_small(CHOICE, 2)
    whole = measure(tmp_path, task, CHOICES)
    some = measure(tmp_path, task, CHOICES, limit=7)
    assert [answer.key for answer in some.answers] == [answer.key for answer in whole.answers[:7]]
    assert [answer.right for answer in some.answers] == [a.right for a in whole.answers[:7]]


def test_what_does_not_fit_is_told(tmp_path):
    """A context loses its beginning, and a question with a longer continuation is left out."""
    rows = [
        {"query": "q" * 90, "choices": ["a", "b"], "gold": 0},
        {"query": "q", "choices": ["a" * 70, "b"], "gold": 0},
        {"query": "q", "choices": ["a", "b"], "gold": 0},
    ]
    said = []
    found = measure(tmp_path, make_small(CHOICE), rows, said=said)
    assert found.counts == {"left_out": 1, "cut": 1, "not_finite": 0} and len(found.answers) == 2
    assert said[0].startswith("small: 1 of 3 questions have a continuation that does not fit")
    assert said[1].startswith("small: 2 of 4 requests do not fit the context of 64 tokens")
    assert len(said) == 2
    assert name_mean([found]) == (
        "mean of 1 of 22, without questions that do not fit the context (1), not CORE"
    )
    assert measure(tmp_path, make_small(CHOICE), rows[1:2], said=said) is None


def test_scores_that_are_not_finite_are_wrong(tmp_path):
    table = TABLE.copy()
    table[ord("q")] = math.nan
    said = []
    rows = [{"query": "q", "choices": ["a", "b"], "gold": 0}, *CHOICES[:3]]
    found = measure(tmp_path, make_small(CHOICE, delimiter=""), rows, table, said)
    place = shuffle(rows).index(rows[0])
    assert found.answers[place].right == (False,) and found.answers[place].shown.chosen is None
    assert found.counts["not_finite"] >= 1 and "not finite" in said[-1]


# ---- bundles ----


def test_the_mean_names_what_is_missing(tmp_path, monkeypatch):
    """Centred rates by hand. The files may lie in folders, alone, or compressed."""
    monkeypatch.setattr(subjects, "CONTEXT", 512)
    write(tmp_path / "eval_data", "copa", CHOICES)
    write(tmp_path, "lambada_openai", TEXTS)
    text = "".join(json.dumps(row) + "\n" for row in SCHEMAS)
    (tmp_path / "winograd_wsc.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    said = []
    subject = subjects.make_subject(TABLE)
    tasks = measure_core(subject, CoreSettings(str(tmp_path)), said.append)
    assert [task.name for task in tasks] == ["copa", "lambada_openai", "winograd"]
    missing = check_core(CoreSettings(str(tmp_path)))[1]
    assert len(missing) == 19 and said[0].endswith(", ".join(missing))

    rates = [np.mean([answer.right[0] for answer in task.answers]) for task in tasks]
    centred = [(rates[0] - 0.5) / 0.5, rates[1], (rates[2] - 0.5) / 0.5]
    mean = find_core_mean(tasks)
    assert mean.label == "mean of 3 of 22, not CORE"
    assert mean.value == pytest.approx(np.mean(centred))
    variances = [rate * (1 - rate) / (40 - 1) for rate in rates]
    scaled = [variances[0] / 0.25, variances[1], variances[2] / 0.25]
    assert mean.stderr == pytest.approx(math.sqrt(sum(scaled)) / 3)

    some = CoreSettings(str(tmp_path), ["winograd", "boolq"], limit=2)
    (only,) = measure_core(subject, some, said.append)
    assert only.name == "winograd" and len(only.answers) == 2 and said[-1].endswith("boolq")
    assert find_core_mean([only], 2).label == (
        "mean of 1 of 22, of at most 2 questions each, not CORE"
    )


def test_all_tasks_whole_are_core():
    counts = {"left_out": 0, "cut": 5, "not_finite": 0}
    tasks = [TaskResult(task.name, ("acc",), [], counts) for task in CORE_TASKS]
    assert name_mean(tasks) == "CORE" and len(set(BY_NAME)) == 22
    assert name_mean(tasks, 5) == "of at most 5 questions each, not CORE"
    assert name_mean(tasks[1:]) == "mean of 21 of 22, not CORE"


@pytest.mark.parametrize(
    "task, rows, words",
    [
        ("copa", [3], "line 1: is no JSON object"),
        (
            "copa",
            [CHOICES[0], {"query": "a", "gold": 0}],
            "line 2: has no choices; its columns are query, gold, and a task of multiple_choice "
            "has query, choices, gold",
        ),
        ("copa", [CHOICES[0] | {"gold": 3}], "line 1: gold = 3: expected 0 to 2"),
        ("copa", [CHOICES[0] | {"gold": True}], "gold = True"),
        ("copa", [CHOICES[0] | {"choices": ["a"]}], "choices: expected a list of two texts"),
        ("copa", [CHOICES[0] | {"query": 1}], "query: expected a text"),
        ("winograd", [SCHEMAS[0] | {"continuation": 1}], "continuation: expected a text"),
        ("winograd", [SCHEMAS[0] | {"context_options": "ab"}], "context_options: expected a list"),
        ("lambada_openai", [TEXTS[0] | {"continuation": " "}], "continuation: is empty"),
        ("piqa", CHOICES[:10], "has 10 rows, and each question needs 10 others as examples"),
    ],
)
def test_files_that_cannot_be(tmp_path, task, rows, words):
    path = write(tmp_path, task, rows)
    with pytest.raises(UsageError) as caught:
        measure_core(subjects.make_subject(TABLE), CoreSettings(str(tmp_path)), print)
    assert str(caught.value).startswith(f"{task}: {path}") and words in str(caught.value)


def test_bundles_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="holds no file of a task; hellaswag_zeroshot, for one"):
        check_core(CoreSettings(str(tmp_path)))
    with pytest.raises(UsageError, match="--core_tasks=copy: choose among hellaswag_zeroshot, "):
        check_core(CoreSettings(str(tmp_path), ["copa", "copy"]))
    write(tmp_path, "copa", CHOICES)
    subject = subjects.make_subject(TABLE, make_char_tokenizer("abc "))
    with pytest.raises(UsageError, match=r"copa: .*copa\.jsonl: "):
        measure_core(subject, CoreSettings(str(tmp_path)), print)
    long = [{"query": "q", "choices": ["a" * 70, "b" * 70], "gold": 0}]
    write(tmp_path, "copa", long)
    with pytest.raises(UsageError, match="no question fits the model's context of 64 tokens"):
        measure_core(subjects.make_subject(TABLE), CoreSettings(str(tmp_path)), print)


# ---- the published files ----


@pytest.mark.skipif(
    not (DATA / "evals").is_dir(),
    reason="no evaluation files: give GPT_JAX_TEST_DATA=DIR, where DIR/evals exists",
)
def test_the_table_says_what_the_published_files_say(tmp_path):
    """Kind, file, count of examples, delimiter and baseline. Files of the bundle can be read."""
    folder = DATA / "evals"
    listed = yaml.safe_load((folder / "dclm_heavy.yaml").read_text())["icl_tasks"]
    published = {task["label"]: task for task in listed}
    with (folder / "dclm_eval_meta_data.csv").open() as file:
        baselines = {
            row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)
        }
    names = json.loads((folder / "dclm_additional_aggregation.json").read_text())
    assert list(BY_NAME) == names["low_variance_datasets"]
    for task in CORE_TASKS:
        other = published[task.name]
        assert other["dataset_uri"] == f"local_data/{task.file}"
        assert other["icl_task_type"] == task.kind and other["num_fewshot"] == [task.shots]
        assert other.get("continuation_delimiter", " ") == task.delimiter
        assert baselines[task.name] == task.baseline

    counts = {"arc_easy": 2376, "copa": 100, "piqa": 1838, "lambada_openai": 5153, "winograd": 273}
    for name, count in counts.items():
        path = find_core_file(str(folder), BY_NAME[name])
        assert len(read_rows(path, BY_NAME[name])) == count
