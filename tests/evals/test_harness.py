"""The model as lm-evaluation-harness asks it, by each of its rules.

What compares with the harness itself is skipped without its package. The rules of texts and
requests are also tested in tests/infer/test_score.py and tests/evals/test_until.py.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
import subjects

from gpt_jax.data.tokenizers.bpe import train_bpe
from gpt_jax.errors import UsageError
from gpt_jax.evals import TaskSettings, list_measured, run_tasks
from gpt_jax.evals.harness import make_harness_model
from gpt_jax.evals.harness_model import HarnessMethods
from gpt_jax.infer import encode_pairs, make_rolling_requests, score

TABLE = subjects.make_chain("abcdefghij", subjects.draw_table())
HAS_HARNESS = True
try:
    import lm_eval.api.model
except ImportError:
    HAS_HARNESS = False
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="needs the package lm_eval")

MULTIPLE_CHOICE = """
task: mine_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: mine_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATED = """
task: mine_generated
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/generated.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["h"], do_sample: false, max_gen_toks: 10}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = {
    "choice": [
        {"q": "one", "choices": ["yes", "no", "perhaps"], "gold": 0},
        {"q": "two", "choices": ["left", "right"], "gold": 1},
        {"q": "three", "choices": ["up", "down and out"], "gold": 0},
    ],
    "rolling": [{"text": "a longer text of some words, " * 6}, {"text": "short"}],
    "generated": [{"q": "xa", "answer": "bcdefg"}, {"q": "xc", "answer": "de"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks in YAML with their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in zip(DOCUMENTS, (MULTIPLE_CHOICE, ROLLING, GENERATED), strict=True):
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
        rows = map(json.dumps, DOCUMENTS[name])
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def make_model(table=TABLE, tokenizer=None, report=None):
    """The model that the harness gets. Without its package it has no base class."""

    def refuse(line):
        raise AssertionError(line)

    make = make_harness_model if HAS_HARNESS else HarnessMethods
    model = make(subjects.make_subject(table, tokenizer), report or refuse)
    model.cache_hook = Hook()
    return model


def ask(*args):
    return SimpleNamespace(args=args)


class Hook:
    """Keeps what a cache is given."""

    def __init__(self):
        self.kept = []

    def add_partial(self, *what):
        self.kept.append(what)


def test_rule_1_long_contexts_are_cut_on_the_left_and_counted():
    said = []
    long, tail = "0123456789" * 9, "abc"
    [(total, _)] = make_model(report=said.append).loglikelihood([ask(long, tail)])
    assert total == pytest.approx(subjects.read_off(TABLE, long, tail), abs=1e-4)
    # 90 + 3 ids, of which the last 65 are kept.
    assert len(said) == 1 and said[0].startswith("1 of 1 requests do not fit the context of 64")


@needs_harness
def test_rule_2_pairs_are_those_of_the_harness(monkeypatch):
    """The texts are encoded as the base class would, with a vocabulary that joins letters."""
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 300)
    model = make_model(subjects.draw_table(), tokenizer)
    # ids beyond the table are never scored here
    texts = [("the quick", " brown"), ("the qui", "ck brown"), ("the  ", "fox"), ("a\n", " dog")]
    theirs = [model._encode_pair(*text) for text in texts]
    ours = [(list(a), list(b)) for a, b in encode_pairs(tokenizer, texts)]
    assert ours == theirs

    seen = []
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda asked, **_: seen.append(asked))
    texts += [("", "fox")]
    model.loglikelihood([ask(*text) for text in texts])
    lm_eval.api.model.TemplateLM.loglikelihood(model, [ask(*text) for text in texts], True)
    mine, others = [[(t, list(a), list(b)) for t, a, b in asked] for asked in seen]
    assert mine == others and mine[-1][1] == [model.prefix_token_id]


@needs_harness
def test_rule_3_windows_are_those_of_the_harness():
    from lm_eval import utils

    for size in (0, 1, 63, 64, 65, 100, 128, 129, 300):
        ids = list(range(size))
        theirs = utils.get_rolling_token_windows(ids, 999, 64, 1)
        theirs = [(list(a), list(b)) for a, b in map(utils.make_disjoint_window, theirs)]
        ours = [(list(a), list(b)) for a, b in make_rolling_requests(ids, 999, 64)]
        assert ours == theirs


def test_rule_3_each_token_of_a_text_is_scored_once():
    texts = [document["text"] for document in DOCUMENTS["rolling"]]
    found = make_model().loglikelihood_rolling([ask(text) for text in texts])
    expected = [subjects.read_off(TABLE, "", text) for text in texts]
    assert found == pytest.approx(expected, abs=1e-3) and isinstance(found[0], float)


@needs_harness
def test_rule_4_generation_settings_mean_what_they_mean_there():
    from lm_eval.models.utils import normalize_gen_kwargs

    from gpt_jax.evals.until import read_sampling

    for settings in (
        {"until": "x", "max_gen_toks": 3},
        {"until": ["x", "y"], "max_new_tokens": 4, "do_sample": False},
        {"max_tokens": 5, "temperature": 0.5},
        {"do_sample": True, "temperature": 0.8, "max_completion_tokens": 6},
        {"do_sample": False, "temperature": 0.0, "max_gen_toks": 2, "max_tokens": 9},
        {"do_sample": True},
    ):
        theirs = normalize_gen_kwargs(settings, default_max_gen_toks=32)
        ours = read_sampling(settings, 64, lambda line: None)
        assert ours.max_new_tokens == theirs["max_gen_toks"]
        assert ours.temperature == theirs.get("temperature", 0.0) and ours.stop == tuple(
            theirs["until"]
        )


def test_rule_4_texts_end_before_a_stop_string():
    model = make_model()
    asked = [
        ask("xa", {"until": ["h"], "max_gen_toks": 9}),
        ask("", {"until": [], "max_tokens": 2}),
    ]
    assert model.generate_until(asked) == ["bcdefg", "ab"]


def test_rule_5_answers_are_cached():
    model = make_model()
    hook = model.cache_hook
    settings = {"until": ["d"], "max_gen_toks": 4}
    [answer] = model.loglikelihood([ask("a", "b")])
    [total] = model.loglikelihood_rolling([ask("abc")])
    model.generate_until([ask("a", settings)])
    assert hook.kept == [
        ("loglikelihood", ("a", "b"), answer),
        ("loglikelihood_rolling", ("abc",), total),
        ("generate_until", ("a", settings), "bc"),
    ]
    model._loglikelihood_tokens([(None, [97], [98])])
    assert len(hook.kept) == 3


def test_rule_6_a_bucket_compiles_once():
    model = make_model(subjects.draw_table(5))
    before = score._score._cache_size()
    model.loglikelihood([ask("x" * size, "y") for size in range(1, 64)])
    assert score._score._cache_size() <= before + 3  # 16, 32 and 64


def test_rule_7_every_process_is_the_only_one(monkeypatch, mesh):
    """The evaluator shares nothing out. Rows lie over the mesh, and the answers stay the same."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    model = make_model()
    assert (model.rank, model.world_size) == (0, 1)
    asked = [ask("x" * size, "abc") for size in range(1, 20)]
    alone = model.loglikelihood(asked)
    with jax.set_mesh(mesh(4)):
        together = model.loglikelihood(asked)
    np.testing.assert_allclose(np.array(together), np.array(alone), rtol=0, atol=1e-4)


@needs_harness
def test_tasks_have_the_metrics_of_the_table(folder):
    """Accuracy, bits a byte and exact matches of three tasks equal what the table gives."""
    names = ["mine_choice", "mine_rolling", "mine_generated"]
    settings = TaskSettings(names, str(folder), log_samples=True)
    results = run_tasks(subjects.make_subject(TABLE), settings, print)
    found = {(row.task, row.metric): row for row in list_measured(results)}

    right = {"acc": 0, "acc_norm": 0}
    for document in DOCUMENTS["choice"]:
        context = f"Q: {document['q']}\nA:"
        choices = document["choices"]
        totals = np.array([subjects.read_off(TABLE, context, f" {c}") for c in choices])
        sizes = np.array([len(choice) for choice in choices])
        right["acc"] += totals.argmax() == document["gold"]
        right["acc_norm"] += (totals / sizes).argmax() == document["gold"]
    for name, count in right.items():
        assert found["mine_choice", name].value == pytest.approx(count / 3)
        assert found["mine_choice", name].stderr is not None

    texts = [document["text"] for document in DOCUMENTS["rolling"]]
    bits = -sum(subjects.read_off(TABLE, "", text) for text in texts) / np.log(2)
    per_byte = bits / sum(len(text.encode()) for text in texts)
    assert found["mine_rolling", "bits_per_byte"].value == pytest.approx(per_byte, rel=1e-5)
    assert found["mine_generated", "exact_match"].value == 0.5
    assert len(results["samples"]["mine_choice"]) == 3
    assert found["mine_choice", "acc"].shots == 0


@needs_harness
def test_tasks_that_cannot_be(folder, tmp_path):
    subject = subjects.make_subject(TABLE)
    with pytest.raises(UsageError, match=r"--include_path=.*: has no task"):
        run_tasks(subject, TaskSettings(["mine_choice"], str(tmp_path)), print)
    with pytest.raises(UsageError, match="mine_choicy: no such task; did you mean mine_choice"):
        run_tasks(subject, TaskSettings(["mine_choicy"], str(folder)), print)
    (tmp_path / "gone.yaml").write_text(MULTIPLE_CHOICE.replace("FOLDER", str(tmp_path)))
    with pytest.raises(UsageError, match="the data of a task cannot be read"):
        run_tasks(subject, TaskSettings(["mine_choice"], str(tmp_path)), print)


@needs_harness
def test_the_command_asks_tasks(folder, tmp_path, capsys):
    runs.run(runs.build(runs.load(tmp_path, "--config.train.steps=2")), tmp_path / "run")
    out = tmp_path / "results.json"
    given = "evaluate", f"--checkpoint={tmp_path / 'run'}", f"--include_path={folder}"
    capsys.readouterr()
    runs.call(*given, "--lm_eval=mine_choice", f"--lm_eval_out={out}", "--limit=2")
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("task ", "mine_choice "))]
    assert table[0] == ["task", "shots", "metric", "value", "stderr"]
    assert [row[:3] for row in table[1:]] == [["mine_choice", "0", n] for n in ("acc", "acc_norm")]

    results = json.loads(out.read_text())
    assert len(results["samples"]["mine_choice"]) == 2
    assert float(table[1][3]) == pytest.approx(results["results"]["mine_choice"]["acc,none"], 1e-3)
    assert os.environ["DISABLE_MULTIPROC"] == "1"


def test_a_missing_package_is_named(tmp_path):
    """With the package or without it, a Python that cannot import it gets one line."""
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from gpt_jax.evals import TaskSettings, run_tasks\n"
        "run_tasks(None, TaskSettings(['copa']), print)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--lm_eval: needs the package lm_eval" in ended.stderr
    assert "-m pip install" in ended.stderr and "lm_eval'" in ended.stderr
