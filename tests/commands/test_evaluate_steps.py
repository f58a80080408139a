"""`gpt-jax evaluate` of all checkpoints of a run, and of each as it appears."""

import json
import shutil

import pytest
import runs

from gpt_jax.commands import evaluate_steps, evaluate_text, evaluate_watch
from gpt_jax.files import hold_lock, is_locked
from gpt_jax.run import lock, restore
from gpt_jax.train import CHECKPOINT_FOLDER, MANIFEST

METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, with the steps 5 and 10, that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


def logged(workdir, step: int) -> dict[str, float]:
    return {name: runs.curve(workdir, f"eval/{name}")[step] for name in METRICS}


def assert_logged(row, workdir) -> None:
    """A row has the numbers that the run logged at its step."""
    found = {name: row["sources"]["held-out"][name] for name in METRICS}
    assert found == pytest.approx(logged(workdir, row["step"]), rel=1e-5)


# ---- all steps ----


def test_all_steps_are_those_of_the_run(call, trained, tmp_path):
    """In order, each as by itself, as JSON and as a table."""
    command = "evaluate", f"--checkpoint={trained}", "--all_steps"
    rows = json.loads(call(*command, "--json")[0])["steps"]
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        assert_logged(row, trained)
        alone = json.loads(
            call("evaluate", f"--checkpoint={trained}", f"--step={row['step']}", "--json")[0]
        )
        assert row == alone

    header, *lines = call(*command)[0].splitlines()
    assert header.split() == ["step", "source", *METRICS, "tokens"]
    assert [line.split()[:3] for line in lines] == [
        [str(row["step"]), "held-out", f"{row['sources']['held-out']['loss']:.4f}"] for row in rows
    ]
    assert len({len(line) for line in (header, *lines)}) == 1


def test_a_program_compiles_once_for_all_steps(call, trained, monkeypatch):
    """Weights alone are new from step to step."""
    programs = []
    original = evaluate_text.TextMeter._program

    def spy(meter, config):
        programs.append(original(meter, config))
        return programs[-1]

    monkeypatch.setattr(evaluate_text.TextMeter, "_program", spy)
    call("evaluate", f"--checkpoint={trained}", "--all_steps")
    assert len(programs) == 4 and len(set(map(id, programs))) == 1  # two texts and sets a step
    assert programs[0]._cache_size() == 1


def test_steps_with_texts_questions_and_evaluators(call, trained, tmp_path):
    text = runs.write_text(tmp_path / "a.txt", 50)
    questions = tmp_path / "riddles.jsonl"
    questions.write_text('{"context": "ab", "answer": "c"}\n')
    command = "evaluate", f"--checkpoint={trained}", "--json"
    for flags in (("--text", text), ("--questions", questions), ("--evaluators", "xz", "heldout")):
        rows = json.loads(call(*command, "--all_steps", *flags)[0])["steps"]
        for row in rows:
            alone = json.loads(call(*command, f"--step={row['step']}", *flags)[0])
            assert row == alone
    lines = call("evaluate", f"--checkpoint={trained}", "--all_steps", "--questions", questions)[0]
    assert "step 5  eval/riddles/exact_match: " in lines and "step 10  eval/riddles" in lines


def test_unfinished_and_damaged_steps_are_passed_over(call, run):
    """Each is told in a line. If nothing is left, the code is that of no valid checkpoint."""
    folder = run / CHECKPOINT_FOLDER
    shutil.copytree(folder / "10", folder / "15")
    (folder / "15" / MANIFEST).unlink()
    (folder / "15.saving").touch()
    # A copy that was cut off has no mark of its saving.
    shutil.copytree(folder / "15", folder / "20")
    meta = folder / "5" / "meta.json"
    meta.write_text(meta.read_text() + " ")
    out, err = call("evaluate", f"--checkpoint={run}", "--all_steps", "--json")
    assert [row["step"] for row in json.loads(out)["steps"]] == [10]
    for step in (15, 20):
        assert f"checkpoint step {step} in {folder} is not finished and is passed over" in err
    assert "checkpoint step 5" in err and "damaged" in err

    shutil.rmtree(folder / "10")
    code, line = runs.refusal("evaluate", f"--checkpoint={run}", "--all_steps")
    assert code == 51 and "checkpoint step 5" in line


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_step_that_its_run_deletes_is_told(call, run, monkeypatch, moment):
    """It is deleted after it was seen, or while its weights are read."""
    folder = run / CHECKPOINT_FOLDER
    name = "resolve_checkpoint" if moment == "before" else "restore_checkpoint"
    original = getattr(restore, name)

    def delete_first(directory, step, *given):
        if step == 5:
            (folder / "5").rename(folder / "5.deleted")
        return original(directory, step, *given)

    monkeypatch.setattr(restore, name, delete_first)
    out, err = call("evaluate", f"--checkpoint={run}", "--all_steps", "--json")
    assert [row["step"] for row in json.loads(out)["steps"]] == [10]
    assert f"step 5 of {folder} was deleted by its run before it could be read" in err


# ---- the file ----


def test_a_file_keeps_what_was_measured(call, trained, tmp_path, monkeypatch):
    """A second call measures nothing that is there, and a cut line is measured again."""
    path = tmp_path / "curve.jsonl"
    command = "evaluate", f"--checkpoint={trained}", "--all_steps", f"--steps_out={path}", "--json"
    first = call(*command)[0]
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == [5, 10] and rows[0]["asked"] == {}
    for row in rows:
        assert_logged(row, trained)

    path.write_bytes(whole[:-10])
    out, err = call(*command)
    assert out == first and path.read_bytes() == whole
    assert "its last line was cut" in err and f"step 5: is in {path} already" in err
    assert "step 10 of" in err and "step 5 of" not in err

    monkeypatch.setattr(restore, "_load", None)
    assert call(*command)[0] == first and path.read_bytes() == whole

    code, line = runs.refusal(*command, "--batches=1")
    assert code == 2 and "for other flags (none)" in line and "name another file" in line


def test_a_file_knows_how_much_text_batches_have(call, trained, tmp_path):
    path = tmp_path / "curve.jsonl"
    command = "evaluate", f"--checkpoint={trained}", "--all_steps", f"--steps_out={path}"
    call(*command, "--batches=1", "--batch_size=8")
    code, line = runs.refusal(*command, "--batches=1", "--batch_size=16")
    assert code == 2 and "for other flags (--batches=1 --batch_size=8)" in line


@pytest.mark.parametrize("text", ["loss 3\n", "a thesis", '{"my": "results"}', "{\n"])
def test_a_file_of_somebody_else_stays_as_it_is(trained, tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    command = "evaluate", f"--checkpoint={trained}", "--all_steps", f"--steps_out={path}"
    code, line = runs.refusal(*command)
    assert code == 2 and f"--steps_out={path}, line 1: no row" in line, line
    assert path.read_text() == text


# ---- watching ----


class Script:
    """Events that happen at each wait of a watch, on a clock of their own."""

    def __init__(self, monkeypatch, *events):
        self.events = list(events)
        self.now = 0.0
        monkeypatch.setattr(evaluate_steps.time, "sleep", self.sleep)
        monkeypatch.setattr(evaluate_watch.time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            self.events.pop(0)()
        assert self.now < 10_000, "the watch never ends"


def watch(call, run, *flags) -> tuple[list[dict], str]:
    out, err = call("evaluate", f"--checkpoint={run}", "--watch", "--json", *flags)
    return [json.loads(line) for line in out.splitlines()], err


def test_each_checkpoint_is_measured_as_it_appears(call, trained, tmp_path, monkeypatch):
    """None is read before it is whole. The run ends when its lock is free at its last step."""
    run = tmp_path / "run"
    folder = run / CHECKPOINT_FOLDER
    saved = trained / CHECKPOINT_FOLDER
    held = []

    def start():
        run.mkdir()
        held.append(hold_lock(run / ".lock", wait=None))
        held[0].__enter__()

    def begin_step():
        folder.mkdir()
        (folder / "5.saving").touch()
        shutil.copytree(saved / "5", folder / "5", ignore=shutil.ignore_patterns(MANIFEST))

    def end_step():
        shutil.copy(saved / "5" / MANIFEST, folder / "5" / MANIFEST)
        (folder / "5.saving").unlink()

    def last_step():
        shutil.copytree(saved / "10", folder / "10")

    def stop():
        held[0].__exit__(None, None, None)

    def nothing():
        assert is_locked(run / ".lock")

    script = Script(monkeypatch, start, begin_step, nothing, end_step, last_step, nothing, stop)
    rows, err = watch(call, run)
    assert [row["step"] for row in rows] == [5, 10]
    for row in rows:
        assert_logged(row, trained)
    assert f"nothing in {run} yet" in err and "the run has finished at step 10" in err
    assert not script.events and "passed over" not in err


def test_a_checkpoint_that_goes_before_its_turn_is_told(call, trained, tmp_path, monkeypatch):
    """The run deletes the second of two while the first is measured."""
    run = tmp_path / "run"
    folder = shutil.copytree(trained / CHECKPOINT_FOLDER, run / CHECKPOINT_FOLDER)
    original = evaluate_text.TextMeter.measure

    def measure(meter, loaded):
        shutil.rmtree(folder / "10", ignore_errors=True)
        return original(meter, loaded)

    monkeypatch.setattr(evaluate_text.TextMeter, "measure", measure)
    Script(monkeypatch)
    rows, err = watch(call, run)
    assert [row["step"] for row in rows] == [5]
    assert "step 10 was deleted by its run before its turn came" in err


def test_steps_on_two_processes(trained, tmp_path):
    """Process 0 decides, prints and writes."""
    path = tmp_path / "curve.jsonl"
    given = ["evaluate", f"--checkpoint={trained}", "--watch", "--json", f"--steps_out={path}"]
    job = runs.job(tmp_path / "logs", 2, given)
    try:
        for process in job:
            process.end(0)
    finally:
        for process in job:
            process.kill()
    rows = [json.loads(line) for line in job[0].out.splitlines()]
    assert [row["step"] for row in rows] == [5, 10] and job[1].out == ""
    for row, line in zip(rows, path.read_text().splitlines(), strict=True):
        assert_logged(row, trained)
        assert json.loads(line) == row | {"asked": {}}


def test_a_run_that_stops_may_be_started_again(call, trained, tmp_path, monkeypatch):
    """Its lock is free for less than RESTART_SECONDS then, and for more if it has ended."""
    run = tmp_path / "run"
    folder = run / CHECKPOINT_FOLDER
    shutil.copytree(trained / CHECKPOINT_FOLDER / "5", folder / "5")
    (run / ".lock").touch()
    with hold_lock(run / ".lock", wait=None):
        pass
    waits = int(evaluate_watch.RESTART_SECONDS / evaluate_watch.POLL_SECONDS)
    script = Script(monkeypatch, *[lambda: None] * (waits - 1))
    script.events.append(lambda: shutil.copytree(trained / CHECKPOINT_FOLDER / "10", folder / "10"))
    rows, err = watch(call, run)
    assert [row["step"] for row in rows] == [5, 10] and "has finished at step 10" in err

    shutil.rmtree(folder / "10")
    rows, err = watch(call, run)
    assert [row["step"] for row in rows] == [5]
    assert "the run has stopped at step 5, before its last one" in err


def test_a_watch_has_a_limit_and_goes_on_after_a_restart(call, trained, tmp_path, monkeypatch):
    """The limit counts from the last checkpoint, also while the run holds its lock."""
    run = tmp_path / "run"
    shutil.copytree(trained / CHECKPOINT_FOLDER / "5", run / CHECKPOINT_FOLDER / "5")
    script = Script(monkeypatch)
    path = tmp_path / "curve.jsonl"
    with hold_lock(run / ".lock", wait=None):
        rows, err = watch(call, run, "--watch_minutes=3", f"--steps_out={path}")
        assert "no new checkpoint for --watch_minutes=3" in err and 180 < script.now < 190
    shutil.copytree(trained / CHECKPOINT_FOLDER / "10", run / CHECKPOINT_FOLDER / "10")
    rows, err = watch(call, run, f"--steps_out={path}")
    assert f"step 5: is in {path} already" in err and [row["step"] for row in rows] == [5, 10]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]

    code, line = runs.refusal(
        "evaluate", f"--checkpoint={tmp_path / 'typo'}", "--watch", "--watch_minutes=1"
    )
    assert code == 51 and "no checkpoint was evaluated" in line


def test_without_locks_the_last_step_ends_a_watch(call, trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained / CHECKPOINT_FOLDER / "5", run / CHECKPOINT_FOLDER / "5")
    monkeypatch.setattr(evaluate_watch, "is_locked", lambda path: None)
    add = lambda: shutil.copytree(  # noqa: E731
        trained / CHECKPOINT_FOLDER / "10", run / CHECKPOINT_FOLDER / "10"
    )
    Script(monkeypatch, *[lambda: None] * 100, add)
    rows, err = watch(call, run)
    assert [row["step"] for row in rows] == [5, 10] and "no lock that can be read" in err


def test_a_look_at_a_lock_leaves_it_alone(tmp_path, monkeypatch):
    """A run that starts in the moment of the look waits for it."""
    path = tmp_path / ".lock"
    assert is_locked(path) is False and not path.exists()
    with hold_lock(path, wait=None):
        assert is_locked(path) is True
    assert is_locked(path) is False
    path.with_name("link").symlink_to(path)
    assert is_locked(path.with_name("link")) is None

    held = hold_lock(path, wait=None)
    held.__enter__()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    with lock.take(path):
        assert is_locked(path) is True


def test_a_watch_beside_a_run(folder, tmp_path):
    """Two programs: each checkpoint of the run is measured as the run measures it."""
    run, path = tmp_path / "run", tmp_path / "curve.jsonl"
    given = [
        *runs.arguments(
            folder, run, "--config.train.steps=12", "--config.checkpoint.every_steps=4"
        ),
        *("--config.eval.every_steps=4", "--config.checkpoint.keep_last=3", "--cpu_devices=1"),
    ]
    watcher = runs.Process(
        tmp_path / "logs", ["evaluate", f"--checkpoint={run}", "--watch", f"--steps_out={path}"]
    )
    trainer = runs.Process(tmp_path / "logs", ["train", *given[1:]])
    try:
        trainer.end(0)
        watcher.end(0)
    finally:
        trainer.kill()
        watcher.kill()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert_logged(row, run)
    assert "the run has finished at step 12" in watcher.err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--all_steps", "--watch"], "--watch evaluates what is there too"),
        (["--all_steps", "--step=5"], "--step=5: is one checkpoint"),
        (["--watch", "--lm_eval=piqa"], "--lm_eval: is for one checkpoint"),
        (["--all_steps", "--questions", __file__, "--page=x.html"], "--page: is for one"),
        (["--watch_minutes=3"], "belongs to --watch"),
        (["--watch", "--watch_minutes=-1"], "--watch_minutes=-1.0: expected 0 to"),
        (["--steps_out=x.jsonl"], "belongs to --all_steps and --watch"),
        (["--all_steps", "--steps_out=nowhere/x.jsonl"], "its folder does not exist"),
        (["--all_steps", "--steps_out=."], "--steps_out=."),
        (["--all_steps", "--checkpoint=memory://a/run"], "--all_steps needs a folder on this"),
    ],
)
def test_flags_of_steps_that_do_not_fit(trained, flags, words):
    code, line = runs.refusal("evaluate", f"--checkpoint={trained}", *flags)
    assert code == 2 and words in line and "\n" not in line


def test_a_file_that_cannot_be_used_is_told_before_the_first_checkpoint(tmp_path):
    given = ("--watch", "--watch_minutes=0.01", f"--steps_out={__file__}")
    code, line = runs.refusal("evaluate", f"--checkpoint={tmp_path}", *given)
    assert code == 2 and "line 1: no row of this command" in line


@pytest.mark.parametrize("flags", [["--all_steps"], ["--watch", "--watch_minutes=1"]])
def test_a_workdir_may_have_the_name_of_a_step(call, trained, tmp_path, flags):
    for name in ("0", "10"):
        (tmp_path / name).symlink_to(trained)
        lines = call("evaluate", f"--checkpoint={tmp_path / name}", *flags, "--batches=1")[0]
        assert [line.split()[0] for line in lines.splitlines()] == ["step", "5", "10"]


def test_a_watch_is_of_a_run(trained):
    code, line = runs.refusal("evaluate", f"--checkpoint={trained / 'checkpoints/5'}", "--watch")
    assert code == 2 and "name the workdir" in line
