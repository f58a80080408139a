"""Named held-out sets: measured beside the held-out text, by name, and never a part of it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import runs
from prepared import prepare, texts, write_jsonl
from tensorboardX.proto import event_pb2

from gpt_jax.errors import UsageError
from gpt_jax.run import loop

SIZES = ("--config.train.steps=4", "--config.eval.every_steps=2", "--config.eval.samples=0")
METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def write_other(path: Path, words: int = 300) -> Path:
    """Letters that the training text does not have."""
    draw = random.Random(1)
    path.write_text(" ".join("".join(draw.choices("uvwxyz", k=4)) for _ in range(words)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets: a text, and a prepared folder of two sources that holds text out."""
    root = tmp_path_factory.mktemp("sets")
    write_other(root / "other.txt")
    for seed, name in enumerate(("wiki", "books")):
        write_jsonl(root / f"{name}.jsonl", texts(60, seed))
    given = [f"{name}={root / name}.jsonl" for name in ("wiki", "books")]
    prepare(root / "both", "--input", *given, "--tokenizer=bytes", "--eval_fraction=0.3")
    return root


def describe_sets(folder: Path) -> str:
    return f"--config.eval.sets=(('odd', '{folder}/oth*.txt'), ('both', '{folder / 'both'}'))"


@pytest.fixture(scope="module")
def measured(folder):
    """A run with the sets, and what it printed."""
    given = runs.arguments(folder, folder / "run", *SIZES, describe_sets(folder))
    process = runs.Process(
        folder / "logs", [*given, "--cpu_devices=1", "--config.log.tensorboard=true"]
    )
    process.end(0)
    return folder / "run", process.err


NAMES = ("odd", "both/wiki", "both/books")


def test_each_set_is_measured_like_a_text_of_its_own(folder, measured, capsys):
    """What the run logs of a set is what `evaluate --text` gives for its path."""
    run, _ = measured
    for step in (2, 4):
        given = f"--checkpoint={run}", "--json", "--text", folder / "other.txt", folder / "both"
        capsys.readouterr()
        if step == 4:
            runs.call("evaluate", *given)
            rows = json.loads(capsys.readouterr().out)["sources"]
            paths = (folder / "other.txt", folder / "both/wiki", folder / "both/books")
            for name, path in zip(NAMES, paths, strict=True):
                logged = {key: runs.curve(run, f"eval/{name}/{key}")[step] for key in METRICS}
                own = {key: rows[str(path)][key] for key in METRICS}
                assert logged == pytest.approx(own, rel=1e-5)
        assert step in runs.curve(run, "eval/odd/loss")


def test_sets_leave_the_run_as_it_is(folder, measured):
    """Losses of training and of held-out text are those of a run without sets, to the bit."""
    run, _ = measured
    runs.run(runs.build(runs.load(folder, *SIZES)), folder / "plain")
    for name in ("train/loss", "eval/loss", "eval/bits_per_byte"):
        assert runs.curve(run, name) == runs.curve(folder / "plain", name)
    assert runs.curve(run, "eval/loss") != runs.curve(run, "eval/odd/loss")


def test_each_place_that_people_look_at_has_the_sets(measured):
    """The terminal's line, the report and TensorBoard have each set by its name."""
    run, err = measured
    loss = runs.curve(run, "eval/odd/loss")[4]
    rate = runs.curve(run, "eval/odd/bits_per_byte")[4]
    (line,) = [line for line in err.splitlines() if line.startswith("step 4  held-out loss")]
    assert f"  odd {loss:.4f} ({rate:.4f} bits/byte)" in line
    assert "  both/wiki " in line and "  both/books " in line

    page = (run / "report.html").read_text()
    before, _, sets = page.partition("<h2>Held-out sets</h2>")
    assert "Held-out text by source" not in page and "odd" not in before
    assert all(f"<td>{name}</td>" in sets for name in NAMES) and f"<td>{loss:.4f}</td>" in sets

    (events,) = (run / "tensorboard").iterdir()
    tag = b"eval/both/wiki/perplexity"
    assert events.read_bytes().count(tag) == 2 and event_pb2.Event is not None


def test_the_command_measures_sets_beside_held_out_text(measured, capsys):
    """Each set has a row that no mean counts, also with --evaluators."""
    run, _ = measured
    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={run}", "--json", "--evaluators", "heldout")
    report = json.loads(capsys.readouterr().out)
    assert list(report["sources"]) == ["held-out"] and list(report["sets"]) == [*NAMES]
    for name in NAMES:
        for key in METRICS:
            value = runs.curve(run, f"eval/{name}/{key}")[4]
            assert report["sets"][name][key] == pytest.approx(value, rel=1e-5)
            assert report["evaluators"][f"eval/{name}/{key}"] == report["sets"][name][key]
    assert report["evaluators"]["eval/loss"] == report["sources"]["held-out"]["loss"]

    runs.call("evaluate", f"--checkpoint={run}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["source", "held-out", *NAMES]


def test_a_run_without_held_out_text_has_its_sets(folder, capsys, monkeypatch):
    """The last evaluation counts as made: a finished run measures nothing again."""
    given = runs.arguments(
        folder, folder / "bare", *SIZES, describe_sets(folder), "--config.data.eval_fraction=0"
    )
    runs.call(*given)
    assert [*runs.curve(folder / "bare", "eval/odd/loss")] == [2, 4]
    assert not runs.curve(folder / "bare", "eval/loss")
    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={folder / 'bare'}", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["sources"] == {} and list(report["sets"]) == [*NAMES]

    # The line of the last evaluation is lost, as in a run that was killed before it.
    path = folder / "bare/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "eval/odd/loss" not in line))
    runs.call(*given)
    assert [*runs.curve(folder / "bare", "eval/odd/loss")] == [4]
    monkeypatch.setattr(loop, "evaluate", None)
    runs.call(*given)


@pytest.mark.parametrize(
    "sets, words",
    [
        ("(('odd', 'nowhere.txt'),)", ("config.eval.sets[0] = 'nowhere.txt'", "no such file")),
        ("(('odd', 'FOLDER/empty.txt'),)", ("config.eval.sets[0] = ", "empty.txt")),
        ("(('odd', ''),)", ("config.eval.sets[0]", "needs both a name and a path")),
        ("(('a/b', 'x'),)", ("config.eval.sets[0]", "a slash")),
        ("(('all', 'x'),)", ("config.eval.sets[0]", "name of a row")),
        ("(('a', 'x'), ('a', 'y'))", ("config.eval.sets[1]", "set before it")),
        ("(('plain', 'x'),)", ("config.eval.sets[0]", "its name is that of a file")),
        (
            "(('birds', 'FOLDER/other.txt'),)",
            ("config.eval.sets[0] = birds", "quiz.v1/birds.jsonl"),
        ),
        ("(('quiz.v1', 'FOLDER/other.txt'),)", ("config.eval.sets[0]", "the folder quiz.v1")),
    ],
)
def test_sets_that_cannot_be(folder, sets, words):
    """One line before anything is trained."""
    (folder / "empty.txt").write_text("")
    (folder / "quiz.v1").mkdir(exist_ok=True)
    for name in ("plain.jsonl", "quiz.v1/birds.jsonl"):
        (folder / name).write_text('{"context": "a", "answer": "b"}\n')
    given = runs.arguments(
        folder,
        folder / "none",
        f"--config.eval.sets={sets.replace('FOLDER', str(folder))}",
        "--config.eval.evaluators=('heldout', 'questions')",
        f"--config.eval.questions=('{folder / 'plain.jsonl'}', '{folder / 'quiz.v1'}')",
    )
    code, line = runs.refusal(*given)
    assert code == 2 and "\n" not in line
    assert [word for word in words if word not in line] == [], line


def test_a_set_has_another_name_than_a_source(folder):
    """Sources are named in the config, or by a prepared folder."""
    sets = f"--config.eval.sets=(('wiki', '{folder / 'other.txt'}'),)"
    named = f"(('wiki', '{folder / 'both'}', 1.0), ('books', '{folder / 'both'}', 1.0))"
    for text in (
        (f"--config.data.sources={named}", "--config.data.path=()"),
        (f"--config.data.path={folder / 'both'}",),
    ):
        code, line = runs.refusal(*runs.arguments(folder, folder / "none", sets, *text))
        assert code == 2 and "config.eval.sets[0]" in line and "a source of config.data" in line
    given = runs.arguments(folder, folder / "none", sets, "--config.eval.evaluators=('xz',)")
    code, line = runs.refusal(*given)
    assert code == 2 and "measured by no evaluator" in line


def test_sets_on_two_processes(folder, measured, tmp_path):
    """They give what one process gives. Each process may have its own path to one text."""
    run, _ = measured
    shutil.copy(folder / "other.txt", tmp_path / "copy.txt")
    paths = [
        [f"--config.eval.sets=(('odd', '{p}'),)"]
        for p in (folder / "other.txt", tmp_path / "copy.txt")
    ]
    given = [*runs.arguments(folder, tmp_path / "job", *SIZES), "--config.mesh.data=2"]
    for process in runs.job(tmp_path / "logs", 2, given, own=paths):
        process.end(0)
    found = runs.curve(tmp_path / "job", "eval/odd/loss")
    assert found == pytest.approx(runs.curve(run, "eval/odd/loss"), rel=1e-4)

    write_other(tmp_path / "copy.txt", 301)
    for process in runs.job(tmp_path / "logs", 2, given, own=paths):
        process.end(2)
        said = process.err.splitlines()[-1]
        assert said.startswith("gpt-jax: the texts of config.eval.sets: not the same on all")


def test_another_text_of_a_set_is_told_at_a_resume(folder, measured, tmp_path, capsys):
    """The checkpoint has a digest of each set, so that a jump of a curve has its reason."""
    run, _ = measured
    workdir = shutil.copytree(run, tmp_path / "run")
    given = runs.arguments(folder, workdir, *SIZES, describe_sets(folder))
    saved = (folder / "other.txt").read_text()
    said = {}
    try:
        for name in ("same", "other"):
            runs.call(*given)
            said[name] = [line for line in capsys.readouterr().out.splitlines() if " odd " in line]
            write_other(folder / "other.txt", 301)
    finally:
        (folder / "other.txt").write_text(saved)
    about = "config.eval.sets: the text of odd has changed since the checkpoint"
    assert [[about in line for line in lines].count(True) for lines in said.values()] == [0, 1]


def test_a_checkpoint_whose_set_has_gone(folder, measured, tmp_path):
    """The command says so, and how to measure something else."""
    run, _ = measured
    (folder / "other.txt").rename(tmp_path / "away.txt")
    try:
        code, line = runs.refusal("evaluate", f"--checkpoint={run}")
    finally:
        (tmp_path / "away.txt").rename(folder / "other.txt")
    assert code == UsageError.code and "config.eval.sets[0]" in line and "with --text" in line
