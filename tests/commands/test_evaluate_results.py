"""`gpt-jax evaluate` with questions and CORE: what is printed, written, and compared."""

import json
import random

import pytest
import runs

from gpt_jax.commands import evaluate_tasks
from gpt_jax.errors import UsageError
from gpt_jax.evals.core_tasks import BY_NAME
from gpt_jax.evals.paired import find_interval


def draw(size: int) -> str:
    return "".join(random.Random(size).choices("abcdefghij", k=size))


CHOICES = [
    {"query": draw(number % 7 + 1), "choices": [draw(number % 4 + 2), "i"], "gold": number % 2}
    for number in range(24)
]
SCHEMAS = [
    {"context_options": [draw(3), draw(6)], "continuation": draw(number + 1), "gold": number % 2}
    for number in range(12)
]


@pytest.fixture
def bundle(tmp_path):
    """Two tasks of CORE without examples."""
    for name, rows in {"copa": CHOICES, "winograd": SCHEMAS}.items():
        path = tmp_path / "bundle" / BY_NAME[name].file
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "bundle"


def test_core_is_asked_written_and_compared(call, trained, bundle, tmp_path):
    """The table, the JSON, the file and the page agree. A checkpoint equals itself."""
    given = "evaluate", f"--checkpoint={trained}", f"--core={bundle}"
    old, new, page = (tmp_path / name for name in ("old.json", "new.json", "new.html"))
    out, err = call(*given, "--step=5", f"--out={old}", "--examples=3")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["task", "shots", "questions", "acc", "stderr"]
    assert [line[:3] for line in lines[1:3]] == [["copa", "0", "24"], ["winograd", "0", "12"]]
    assert " ".join(lines[-1][:7]) == "mean of 2 of 22, not CORE:"
    assert lines[-2][:2] == ["missing:", "hellaswag_zeroshot,"] and len(lines[-2]) == 21
    assert "tasks without a file in" in err

    written = json.loads(old.read_text())
    rates = [written["tasks"][name]["summary"]["acc"] for name in ("copa", "winograd")]
    assert [line[3] for line in lines[1:3]] == [f"{rate:.4f}" for rate in rates]
    mean = sum((rate - 0.5) / 0.5 for rate in rates) / 2
    assert float(lines[-1][7]) == pytest.approx(mean, abs=1e-4)
    assert written["core"]["value"] == pytest.approx(mean)
    assert written["step"] == 5 and len(written["tasks"]["copa"]["examples"]) == 3
    for task in written["tasks"].values():
        rights = [right for _, _, (right,) in task["answers"]]
        assert task["summary"]["acc"] == sum(rights) / len(rights)
        for example in task["examples"]:
            best = example["values"].index(max(example["values"]))
            assert example["chosen"] == best
            assert example["right"] == {"acc": best == example["gold"]}

    report = json.loads(
        call(*given, f"--compare={old}", f"--out={new}", f"--page={page}", "--json")[0]
    )
    after = json.loads(new.read_text())
    assert report["core"] == after["core"] and report["step"] == 10
    for name, task in report["compared"]["tasks"].items():
        pairs = zip(written["tasks"][name]["answers"], after["tasks"][name]["answers"], strict=True)
        changes = [int(new[2][0]) - int(old[2][0]) for old, new in pairs]
        assert task["acc"]["gained"] == changes.count(1) and task["acc"]["lost"] == changes.count(
            -1
        )
        assert task["acc"]["now"] - task["acc"]["before"] == pytest.approx(
            task["acc"]["difference"]["value"]
        )
    core = report["compared"]["core"]
    assert core["value"] == pytest.approx(after["core"]["value"] - written["core"]["value"])
    assert f"Compared with {trained}/checkpoints, step 5" in page.read_text()

    same = call(*given, f"--compare={new}", "--core_tasks=copa", "--limit=9")[0].splitlines()
    assert f"compared with {trained}/checkpoints, step 10" in same
    assert "mean of 1 of 22, of at most 9 questions each, not CORE: " in "\n".join(same)
    # Nothing changed, and nine questions are few. A guess has half of them.
    reach = find_interval(0, 0, 9)[1] / (1 - 0.5)
    line = f"mean of the shared tasks: +0.0000 ({-reach:+.4f} to {reach:+.4f}), p 1.0000"
    assert line in same
    assert "questions that were asked one time alone, and are not compared: 15 of copa" in same
    assert "tasks that are not compared: winograd" in same


def test_questions_are_written_and_compared(call, trained, tmp_path):
    plain = tmp_path / "mine.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    given = "evaluate", f"--checkpoint={trained}", "--questions", plain
    out = tmp_path / "out.json"
    report = json.loads(call(*given, f"--out={out}", "--json")[0])
    task = json.loads(out.read_text())["tasks"]["mine"]
    for metric in task["metrics"]:
        assert report["questions"][f"eval/mine/{metric}"] == task["summary"][metric]
    assert len(task["examples"]) == 5 and len(task["answers"]) == 24

    text = call(*given, f"--compare={out}", "--step=5", "--limit=4")[0]
    assert "eval/mine/questions: 4\n" in text and "mine  acc_norm_byte" in text
    plain.write_text(json.dumps(CHOICES[0] | {"query": "ab"}) + "\n")
    lines = call(*given, f"--compare={out}")[0].splitlines()
    name = f"{trained}/checkpoints, step 10"
    assert lines[-2:] == [
        f"compared with {name}: no question was asked both times",
        "tasks that are not compared: mine",
    ]


def test_flags_of_results(tmp_path, bundle):
    given = "evaluate", f"--checkpoint={tmp_path}"
    asked = f"--core={bundle}"
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    task = next(path for path in bundle.rglob("*") if path.is_file())
    for more, words in {
        ("--out=a.json",): "--out: belongs to --questions or --core",
        ("--lm_eval=copa", "--page=a.html"): "--page: belongs to --questions or --core",
        ("--core_tasks=copa",): "--core_tasks: belongs to --core",
        ("--limit=3",): "--limit: belongs to --questions or --core or --lm_eval",
        (asked, "--num_fewshot=3"): "--num_fewshot: belongs to --lm_eval",
        (asked, "--lm_eval=copa"): "--core: is measured without --lm_eval",
        (asked, "--text=a"): "--text: is for text; leave it out with --core",
        (asked, "--core_tasks=cope"): "--core_tasks=cope: choose among hellaswag_zeroshot",
        (asked, "--core_tasks=piqa"): "holds no file of a task; piqa, for one, is looked for",
        (f"--core={tmp_path}/none",): "none': no such folder",
        (asked, "--examples=-1"): "--examples=-1: expected 0 or more",
        (asked, f"--out={tmp_path}"): "is a folder; name a file",
        (asked, f"--page={tmp_path}/none/a.html"): "its folder does not exist",
        (asked, "--out=a", "--page=./a"): "--page = './a': is the file of --out",
        (asked, f"--out={task}"): "is read by --core, and would be overwritten",
        (f"--questions={wrong}", f"--page={wrong}"): "is read by --questions",
        (asked, "--compare=none.json"): "--compare = 'none.json': no such file",
        (asked, f"--compare={wrong}"): f"--compare = {wrong}: holds no results of questions",
    }.items():
        code, line = runs.refusal(*given, *more)
        assert code == 2 and words in line, line


def test_answers_outlive_a_file_that_cannot_be_written(
    trained, bundle, tmp_path, capsys, monkeypatch
):
    given = "evaluate", f"--checkpoint={trained}", f"--core={bundle}", "--core_tasks=copa"
    long = tmp_path / ("x" * 300)
    capsys.readouterr()
    code, line = runs.refusal(*given, f"--page={long}")
    assert code == 50 and line.startswith(f"--page={long}: cannot be written: ")
    assert "mean of 1 of 22, not CORE: " in capsys.readouterr().out

    def fail(text):
        raise UsageError("standard output is full")

    monkeypatch.setattr(evaluate_tasks, "emit", fail)
    page = tmp_path / "page.html"
    assert runs.refusal(*given, f"--page={page}") == (2, "standard output is full")
    assert page.read_text().startswith("<!doctype html>")
