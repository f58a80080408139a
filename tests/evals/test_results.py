"""Results as a file and as a page: they say what was answered, and nothing else gets in."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from gpt_jax.errors import UsageError
from gpt_jax.evals import Comparison, Page, compare_tasks, find_core_mean, make_results_page
from gpt_jax.evals.paired import Difference
from gpt_jax.evals.results import Answer, TaskResult, read_results, show, to_json

COUNTS = {"left_out": 1, "cut": 2, "not_finite": 0}
NASTY = "<script>alert('x')</script> & \"q\" 我 \x00\ud800"


def make_tasks(rights=(True, False, True), text=NASTY) -> list[TaskResult]:
    shown = show(text, [text, "b"], 1, [-1.0, -2.0])
    answers = [Answer(row, f"k{row}", (right,)) for row, right in enumerate(rights, 1)]
    answers[0] = answers[0]._replace(shown=shown)
    choice = TaskResult("copa", ("acc",), answers, COUNTS, 0.5, 0, "copa.jsonl")
    nothing = Answer(1, "k", (False,), show("c", ["d"], 0, [math.nan]))
    return [choice, TaskResult("words", ("exact_match",), [nothing], COUNTS)]


def save(tmp_path, results, **about):
    path = tmp_path / "results.json"
    values = {"checkpoint": "runs/a", "step": 7} | to_json(results) | about
    path.write_text(json.dumps(values, allow_nan=False))
    return str(path)


def test_a_choice_has_its_part_among_all():
    shown = show("c", ["a", "b", "c"], 0, [-3.0, -1.0, -2.0])
    weights = [math.exp(value) for value in shown.values]
    assert shown.chosen == 1
    assert shown.shares == pytest.approx([weight / sum(weights) for weight in weights])
    far = show("c", ["a", "b"], 0, [-90000.0, -90001.0])
    assert far.shares == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    alone = show("c", ["a"], 0, [-2.0])
    assert alone.shares == [math.exp(-2)] and alone.chosen is None
    assert show("c", ["a", "b"], 0, [math.nan, -1.0]).chosen is None


def test_a_file_gives_the_answers_back(tmp_path):
    tasks = make_tasks()
    found = read_results(save(tmp_path, tasks))
    assert (found.checkpoint, found.step, list(found.tasks)) == ("runs/a", 7, ["copa", "words"])
    for task in tasks:
        other = found.tasks[task.name]
        assert (other.metrics, other.baseline, other.source) == (
            task.metrics,
            task.baseline,
            task.source,
        )
        assert [one[:3] for one in other.answers] == [one[:3] for one in task.answers]
    values = to_json(tasks)["tasks"]
    assert values["copa"]["summary"]["acc"] == 2 / 3
    assert values["copa"]["summary"]["acc_centred"] == pytest.approx(1 / 3)
    (example,) = values["copa"]["examples"]
    assert example["chosen"] == 0 and example["gold"] == 1 and example["right"] == {"acc": True}
    assert values["words"]["examples"][0]["shares"] == [None]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}", "holds no results of questions"),
        ("no", "holds no results of questions (not JSON"),
        ('{"format": 2, "checkpoint": "a", "step": 1, "tasks": {}}', "format"),
    ],
)
def test_files_that_cannot_be(tmp_path, text, words):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_results(str(path))
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(str(tmp_path))
    values = to_json(make_tasks())["tasks"]
    values["copa"]["answers"][0][2] = [True, True]
    with pytest.raises(UsageError, match="the answers of copa are damaged"):
        read_results(save(tmp_path, [], tasks=values))


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = set()
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.data += data + "\n"


def test_a_page_stands_alone_and_escapes_its_texts():
    tasks = make_tasks()
    older = {task.name: task for task in make_tasks((False, False, False))}
    compared, _ = compare_tasks(older, tasks)
    comparison = Comparison(NASTY, compared, [NASTY], Difference(0.5, 0.3, 0.7, 0.01))
    core = find_core_mean(tasks[:1])
    html = make_results_page(Page(NASTY, NASTY, tasks, core, comparison))
    page = Reader(html)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(|@import""", html)
    assert not {"script", "link", "iframe", "object", "img"} & page.tags
    assert page.data.count("<script>alert('x')</script> & \"q\" 我 \ufffd\ufffd") >= 6

    cells = page.data.split("\n")
    rates = cells[cells.index("copa") :]
    assert rates[:7] == ["copa", "0", "acc", "0.6667 ± 0.3333", "0.500", "0.3333", "3"]
    assert "mean of 1 of 22, without questions that do not fit the context (1), not CORE" in cells
    at = cells.index("before")
    assert cells[cells.index("copa", at) :][:5] == ["copa", "acc", "0.0000", "0.6667", "+0.6667"]
    # The example of the first row: the right option is not the chosen one.
    assert cells[cells.index("chosen") :][2:4] == ["0.7311", "-1.000"]
    assert cells[cells.index("right", cells.index("chosen")) :][1:3] == ["b", "0.2689"]
    assert cells[cells.index("d") + 1] == "-"


def test_a_page_without_more_has_rates_alone():
    page = Reader(make_results_page(Page("Answers", "runs/a", make_tasks()[1:])))
    assert (
        "Compared" not in page.data and "CORE" not in page.data and "0.0000 ± 0.0000" in page.data
    )
