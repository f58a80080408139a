"""Questions of local files: what is counted right, and what cannot be read."""

import codecs
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
import subjects

from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.evals import Subject, check_questions
from gpt_jax.evals.question_kinds import COMPARISONS
from gpt_jax.evals.questions import measure_questions
from gpt_jax.infer import score_batches
from gpt_jax.run import evaluation

TABLE = subjects.draw_table()
CHOICES = [
    {"context": "Is it", "choices": [" so", " not so long"], "gold": 0},
    {"context": "Is it not", "choices": [" é", " an", " three"], "gold": 2},
    {"context": "Is", "choices": [" a longer one", " b"], "gold": 1},
    {"context": "What", "choices": ["?", "!"], "gold": 0, "unconditional": "So:"},
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measure(*paths, table=TABLE, tokenizer=None) -> dict[str, float]:
    def refuse(line):
        raise AssertionError(line)

    return measure_questions(subjects.make_subject(table, tokenizer), paths, refuse)


def test_choices_are_compared_in_four_ways(tmp_path):
    """A bigram model by hand has exact scores; each metric counts what a loop over them counts."""
    rng = np.random.default_rng(7)
    rows = CHOICES + [
        {
            "context": "".join(map(chr, rng.integers(97, 123, 4))),
            # Their first bytes differ, or the unconditional scores of two would be the same.
            "choices": [
                first + "".join(map(chr, rng.integers(161, 233, size)))
                for first, size in zip(("      x", "y", "z"), (2, 5, 9), strict=True)
            ],
            "gold": int(rng.integers(3)),
        }
        for _ in range(40)
    ]
    right = dict.fromkeys(("acc", "acc_norm_token", "acc_norm_byte"), 0)
    right["acc_norm_unconditional"] = 0
    for row in rows:
        choices = row["choices"]
        given = np.array([subjects.read_off(TABLE, row["context"], c) for c in choices])
        alone = [subjects.read_off(TABLE, row.get("unconditional", ""), c) for c in choices]
        sizes = np.array([len(c.encode()) for c in choices])
        bare = np.array([len(c.strip().encode()) for c in choices])
        compared = (given, given / sizes, given / bare, given - alone)
        for name, values in zip(right, compared, strict=True):
            right[name] += values.argmax() == row["gold"]

    found = measure(write(tmp_path / "mine.jsonl", rows))
    assert len(set(right.values())) > 1  # the ways differ here
    for name, count in right.items():
        rate = count / len(rows)
        assert found[f"eval/mine/{name}"] == rate
        deviation = np.std([1] * count + [0] * (len(rows) - count), ddof=1)
        expected = deviation / math.sqrt(len(rows))
        assert found[f"eval/mine/{name}_stderr"] == pytest.approx(expected)
    assert found["eval/mine/questions"] == len(rows) and found["eval/mine/cut"] == 0
    assert found["eval/mine/left_out"] == found["eval/mine/not_finite"] == 0
    assert len(found) == 12


def test_an_answer_matches_if_each_token_is_the_likeliest(tmp_path):
    table = subjects.make_chain("the quick", TABLE)
    rows = [
        {"context": "the", "answer": " quick"},
        {"context": "th", "answer": "e"},
        {"context": "the", "answer": " quack"},
        {"context": "", "answer": "the "},
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = measure(str(path), table=table)
    assert found["eval/words/exact_match"] == 0.75 and found["eval/words/questions"] == 4
    assert found["eval/words/exact_match_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_contexts_that_are_cut_are_counted(tmp_path):
    said = []
    rows = [{"context": "a" * 80, "answer": "b"}, {"context": "a", "answer": "b"}]
    subject = subjects.make_subject(TABLE)
    found = measure_questions(subject, [write(tmp_path / "q.jsonl", rows)], said.append)
    assert found["eval/q/cut"] == 1 and len(said) == 1 and "1 of 2 requests" in said[0]

    # Two choices of one question are one row.
    rows = [{"context": "a" * 80, "choices": ["b", "c"], "gold": 0}]
    found = measure_questions(subject, [write(tmp_path / "c.jsonl", rows)], said.append)
    assert found["eval/c/cut"] == found["eval/c/questions"] == 1


def test_a_run_is_told_at_each_batch(tmp_path, monkeypatch):
    """The watchdog hears of each batch, and a request to stop ends the evaluation there."""
    monkeypatch.setattr(score_batches, "TOKENS", 16)
    # Answers to one context would share a row.
    rows = [{"context": context, "answer": "b"} for context in "acdef"]
    path = write(tmp_path / "q.jsonl", rows)
    ticks = []
    subject = subjects.make_subject(TABLE)
    measure_questions(subject, [path], print, lambda: ticks.append(1))
    assert len(ticks) == 5

    folder = tmp_path / "asked"
    folder.mkdir()
    write(folder / "letters.jsonl", [{"context": "abc", "answer": "d"}])
    sizes = "--config.train.steps=1", "--config.eval.batches=1", "--config.data.tokenizer=bytes"
    asked = runs.load(
        tmp_path,
        *sizes,
        "--config.eval.evaluators=('questions',)",
        f"--config.eval.questions=('{folder}',)",
    )
    parts = runs.build(asked)
    told = []
    progress = SimpleNamespace(
        settle=lambda: None,
        parts=parts,
        config=parts.config,
        heldout={},
        beat=lambda: told.append(1),
        shares=lambda step: {},
        clock=SimpleNamespace(phase=lambda name: nullcontext()),
    )
    with jax.set_mesh(parts.mesh):
        state = parts.init()
        assert not evaluation.evaluate(progress, state, 1, lambda: True)
    assert told == [1]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "has no rows"),
        (["text"], "line 1: is no JSON object; expected {context, choices, gold} or {context, an"),
        ([{"query": "a"}], "line 1: has the columns query; expected {context, choices, gold}"),
        ([CHOICES[0], {"context": "a", "choices": ["a", "b"]}], "line 2: has no gold"),
        ([{"context": 3, "answer": "a"}], "line 1: context: expected a text"),
        ([{"context": "a", "answer": ""}], "line 1: answer: expected a text"),
        ([CHOICES[0] | {"gold": 2}], "line 1: gold = 2: expected 0 to 1"),
        ([CHOICES[0] | {"gold": True}], "gold = True"),
        ([CHOICES[0] | {"choices": ["a"]}], "choices: expected a list of two texts"),
        ([CHOICES[0] | {"choices": ["a", " "]}], "none of them empty"),
        ([CHOICES[0] | {"unconditional": 1}], "unconditional: expected a text"),
    ],
)
def test_rows_that_cannot_be(tmp_path, rows, words):
    path = write(tmp_path / "q.jsonl", rows)
    subject = subjects.make_subject(TABLE)
    with pytest.raises(UsageError) as caught:
        check_questions(subject.model, subject.tokenizer, [path], print)
    assert words in str(caught.value) and str(caught.value).startswith(f"questions {path}")


def test_files_that_cannot_be(tmp_path):
    model, *_, tokenizer = subjects.make_subject(TABLE)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        check_questions(model, tokenizer, [str(tmp_path / "none.jsonl")], print)
    (tmp_path / "more").mkdir()
    paths = [write(tmp_path / place, CHOICES) for place in ("a.jsonl", "more/a.jsonl")]
    with pytest.raises(UsageError, match="both would be named a; rename one"):
        check_questions(model, tokenizer, paths, print)
    with pytest.raises(UsageError, match=r"a\.jsonl: an empty context: the char tokenizer"):
        check_questions(model, make_char_tokenizer("Isitnoanerlgbhae So:W?!té"), paths[:1], print)
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(UsageError, match=r"deep\.jsonl, line 1: is no JSON object"):
        check_questions(model, tokenizer, [str(path)], print)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    path = write(tmp_path / "q.jsonl", CHOICES)
    plain = measure(path)
    Path(path).write_bytes(codecs.BOM_UTF8 + Path(path).read_bytes())
    assert measure(path) == plain


def test_questions_that_do_not_fit_are_left_out(tmp_path):
    """The others are asked as in a file of their own. A file without others is refused."""
    long = {"context": "Is", "choices": [" a", " " + "b" * 64], "gold": 0}
    subject = subjects.make_subject(TABLE)
    said = []
    path = write(tmp_path / "q.jsonl", [CHOICES[0], long, *CHOICES[1:]])
    found = measure_questions(subject, [path], said.append)
    line = f"1 of 5 questions of {path} do not fit the context of 64 and are left out"
    assert said == [line] and found["eval/q/left_out"] == 1
    alone = measure(write(tmp_path / "q.jsonl", CHOICES))
    assert found == alone | {"eval/q/left_out": 1}

    path = write(tmp_path / "long.jsonl", [{"context": "a", "answer": "b" * 65}] * 2)
    with pytest.raises(UsageError, match=r"2 of 2 questions of .*long\.jsonl do not fit .* 64, so"):
        check_questions(subject.model, subject.tokenizer, [path], print)
    whole = write(tmp_path / "whole.jsonl", [{"context": "a", "answer": "b" * 64}])
    check_questions(subject.model, subject.tokenizer, [whole], said.append)
    assert said == [line]


@pytest.mark.parametrize("row", [CHOICES[0], {"context": "a", "answer": "z"}])
def test_scores_that_are_not_finite_are_wrong(tmp_path, row):
    """NaN after one byte spoils the row that has it. NaN after each byte spoils all rows."""
    spoiled = row | {"context": row["context"] + "q"}
    path = write(tmp_path / "q.jsonl", [row, spoiled, row])
    model, compute, params, tokenizer = subjects.make_subject(subjects.make_chain("az", TABLE))
    sound = measure_questions(
        Subject(model, compute, params, tokenizer), [write(tmp_path / "one.jsonl", [row])], print
    )
    metrics = ["exact_match"] if "answer" in row else COMPARISONS
    assert any(sound[f"eval/one/{metric}"] == 1 for metric in metrics)
    for bytes_, count in ((ord("q"), 1), (slice(None), 3)):
        table = params["embed"]["table"].at[bytes_].set(np.nan)
        subject = Subject(model, compute, params | {"embed": {"table": table}}, tokenizer)
        said = []
        found = measure_questions(subject, [path], said.append)
        words = f"{count} of 3 questions of {path} have a score that is not finite, and count as"
        assert len(said) == 1 and said[0].startswith(words)
        assert found["eval/q/not_finite"] == count
        for metric in metrics:
            rate = sound[f"eval/one/{metric}"] * (3 - count) / 3
            assert found[f"eval/q/{metric}"] == pytest.approx(rate)


def test_a_run_asks_and_the_command_asks_again(tmp_path, capsys):
    """Both write the same numbers, and what cannot be asked ends the run at its start."""
    lines = [
        {"context": "abc def", "choices": [" cab", " fig"], "gold": 1},
        {"context": "abc", "choices": [" d", " e"], "gold": 0, "unconditional": "a"},
        {"context": "abc", "choices": [" d", "a" * 999], "gold": 0},
    ]
    lines = [{"unconditional": " "} | line for line in lines]
    path = write(tmp_path / "asked.jsonl", lines)
    sizes = "--config.train.steps=2", "--config.eval.batches=1", "--config.data.tokenizer=bytes"
    evaluators = "--config.eval.evaluators=('heldout','questions')"
    asked = runs.load(tmp_path, *sizes, evaluators, f"--config.eval.questions=('{path}',)")
    runs.run(runs.build(asked), tmp_path / "run")
    left_out = f"1 of 3 questions of {path} do not fit the context of 32 and are left out\n"
    assert left_out in capsys.readouterr().out
    assert runs.curve(tmp_path / "run", "eval/asked/left_out") == {2: 1}
    acc = runs.curve(tmp_path / "run", "eval/asked/acc_norm_byte")[2]
    assert runs.curve(tmp_path / "run", "eval/asked/questions") == {2: 2}

    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={tmp_path / 'run'}", "--questions", path, "--json")
    out, err = capsys.readouterr()
    assert err.count(left_out) == 1
    found = json.loads(out)
    assert found["step"] == 2 and found["questions"]["eval/asked/acc_norm_byte"] == acc
    runs.call("evaluate", f"--checkpoint={tmp_path / 'run'}", "--questions", path)
    assert f"eval/asked/acc_norm_byte: {acc:g}\n" in capsys.readouterr().out

    given = runs.arguments(tmp_path, tmp_path / "other", *sizes)
    code, line = runs.refusal(*given, evaluators)
    assert code == 2 and "config.eval.questions names no file" in line
    code, line = runs.refusal(*given, f"--config.eval.questions=('{path}',)")
    assert code == 2 and "is asked by no evaluator" in line
    code, line = runs.refusal(*given, evaluators, "--config.eval.questions=('none.jsonl',)")
    assert code == 2 and "questions none.jsonl: cannot be read" in line


def test_flags_that_do_not_go_together(tmp_path):
    path = write(tmp_path / "q.jsonl", CHOICES)
    given = "evaluate", f"--checkpoint={tmp_path}", "--questions"
    for more, words in {
        ("none.jsonl",): "--questions = 'none.jsonl': no such file",
        (path, "--batches=3"): "--batches: is for text; leave it out with --questions",
        (path, "--lm_eval=copa"): "call the command twice",
        (path, "--num_fewshot=3"): "--num_fewshot: belongs to --lm_eval",
    }.items():
        code, line = runs.refusal(*given, *more)
        assert code == 2 and words in line
    for more, words in {
        "--limit=0": "--limit=0: expected 1 or more",
        "--num_fewshot=-1": "--num_fewshot=-1: expected 0 or more",
        "--include_path=none": "--include_path = 'none': no such folder",
        "--lm_eval_out=none/x.json": "its folder does not exist",
        f"--lm_eval_out={tmp_path}": "is a folder; name a file",
    }.items():
        code, line = runs.refusal(*given[:2], "--lm_eval=copa", more)
        assert code == 2 and words in line
