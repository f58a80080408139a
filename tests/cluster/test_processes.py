"""Several real processes of one job.

They have the losses of one process, and end together with the right code.
"""

import random
import shutil
import signal
import subprocess
import time

import forks
import numpy as np
import pytest
import runs

from gpt_jax.cluster import code as version
from gpt_jax.train.checkpoint.manifest import CHECKPOINT_FOLDER, steps_in

BUSY = ("--config.eval.every_steps=0", "--config.checkpoint.every_steps=10")


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def alone(folder, *overrides):
    """Losses of the same config on one device of this process."""
    parts = runs.build(runs.load(folder, *overrides))
    runs.run(parts, folder / "alone")
    return parts, runs.curve(folder / "alone")


def finish(job, codes) -> None:
    for process, code in zip(job, codes, strict=True):
        process.end(code)


def assert_close(found: dict, wanted: dict, relative: float) -> None:
    assert found.keys() <= wanted.keys() and found
    np.testing.assert_allclose([*found.values()], [wanted[step] for step in found], rtol=relative)


MOE = "--config.model.pattern=(('attention', 'moe'),)"


@pytest.mark.parametrize(
    "processes, devices, mesh, model",
    [
        (2, 1, "data=2", []),
        (4, 1, "fsdp=2 tensor=2", []),
        pytest.param(2, 4, "dcn_data=2 expert=2 tensor=2", [MOE], marks=pytest.mark.deep),
        pytest.param(2, 2, "pipeline=2 context=2", [], marks=pytest.mark.deep),
        pytest.param(4, 2, "pipeline=2 expert=2 tensor=2", [MOE], marks=pytest.mark.deep),
    ],
)
def test_losses_do_not_depend_on_the_processes(tmp_path, processes, devices, mesh, model):
    axes = [f"--config.mesh.{size}" for size in ("data=1", *mesh.split())]
    job = runs.job(
        tmp_path / "logs",
        processes,
        runs.arguments(
            tmp_path,
            tmp_path / "job",
            *axes,
            *model,
            "--config.eval.samples=3",
            f"--config.checkpoint.export={'none' if model else 'hf'}",
        ),
        devices,
        # One of the cases has interpreters of its own, and so a hash seed for each.
        start=subprocess.Popen if mesh == "data=2" else forks.Popen,
    )
    finish(job, [0] * processes)
    assert [process.out for process in job[1:]] == [""] * (
        processes - 1
    )  # process 0 alone speaks and writes
    assert (
        not any("held-out loss" in process.err for process in job[1:])
        and "held-out loss" in job[0].err
    )
    _, wanted = alone(tmp_path, *model)
    found = runs.curve(tmp_path / "job")
    assert list(found) == list(range(1, 21))
    assert_close({step: found[step] for step in (1, 2, 3)}, wanted, 1e-5)

    # A router's choice is a step: one rounding may send one token to another expert later on.
    relative = 1e-3 if model == [MOE] else 1e-5
    assert_close(found, wanted, relative)
    assert_close(
        runs.curve(tmp_path / "job", "eval/loss"),
        runs.curve(tmp_path / "alone", "eval/loss"),
        relative,
    )
    assert (tmp_path / "job/report.html").exists()  # made after sampling, on all processes
    assert (tmp_path / "job/hf/20/config.json").exists() == (not model)


@pytest.mark.deep
@pytest.mark.parametrize("kills", [[12], [12, 28]])
def test_killed_and_resumed_on_two_and_on_one(tmp_path, kills):
    overrides = ("--config.train.steps=60", "--config.mesh.data=1", "--config.mesh.fsdp=2", *BUSY)
    whole, broken, moved = tmp_path / "whole", tmp_path / "broken", tmp_path / "moved"
    finish(runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, whole, *overrides)), [0, 0])
    draw = random.Random(5)
    for low in kills:
        job = runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, broken, *overrides))
        step = draw.randrange(low, low + 12)
        job[0].until(runs.logged(broken, step), f"step {step}")
        for process in draw.sample(job, 2):
            process.kill()
            time.sleep(draw.uniform(0, 0.03))
    shutil.copytree(broken, moved)
    finish(runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, broken, *overrides)), [0, 0])
    assert "resumed from step" in runs.STARTED[-2].out
    wanted = runs.curve(whole)
    assert runs.curve(broken) == wanted and list(wanted) == list(range(1, 61))

    parts = runs.build(runs.load(tmp_path, *overrides, "--config.mesh.fsdp=1"))
    step, arrays = runs.final_state(parts, whole)
    assert step == 60 and not runs.differing(arrays, runs.final_state(parts, broken)[1])

    lines = []
    runs.run(parts, moved, lines.append)
    start = next(int(line.split()[3]) for line in lines if line.startswith("resumed from step"))
    found = {step: loss for step, loss in runs.curve(moved).items() if start < step}
    assert 10 <= start < 60 and len(found) == 60 - start
    assert_close({step: loss for step, loss in found.items() if step <= start + 3}, wanted, 1e-6)
    assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.deep)]
)
def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path, number):
    given = runs.arguments(
        tmp_path,
        tmp_path / "job",
        "--config.train.steps=100000",
        "--config.checkpoint.every_steps=0",
        "--config.eval.every_steps=0",
    )
    job = runs.job(tmp_path / "logs", 2, given)
    job[0].until(runs.logged(tmp_path / "job", 20), "step 20")
    job[1].signal(number)
    finish(job, [10, 10])
    said = [process.err.split("stopped on request after step ")[1].split()[0] for process in job]
    steps = steps_in(tmp_path / "job" / CHECKPOINT_FOLDER)
    assert [str(step) for step in steps] == said[:1] and said[0] == said[1]
    parts = runs.build(runs.load(tmp_path))
    assert runs.final_state(parts, tmp_path / "job")[0] == steps[0]


@pytest.mark.parametrize(
    "victim, every", [(1, 0), (0, 0), pytest.param(1, 1, marks=pytest.mark.deep)]
)
def test_when_one_is_killed_the_other_leaves_and_says_why(tmp_path, victim, every):
    """The kill comes between saves, or during one of them.

    Process 0 holds the coordination service.
    """
    given = runs.arguments(
        tmp_path,
        tmp_path / "job",
        "--config.train.steps=100000",
        "--config.eval.every_steps=0",
        f"--config.checkpoint.every_steps={every}",
        "--heartbeat_seconds=10",
    )
    job = runs.job(tmp_path / "logs", 2, given)
    job[0].until(runs.logged(tmp_path / "job", 20), "step 20")
    job[victim].kill()
    other = job[1 - victim]
    other.end(40, 100)  # 10 s for its heartbeats to be missed; the rest is for a busy machine
    # Not always the last line: the thread that noticed first may be writing its own.
    assert any(
        line.startswith("gpt-jax: ") and "a peer process" in line for line in other.err.splitlines()
    )
    assert "Traceback" not in other.err


@pytest.mark.parametrize(
    "own, words",
    [
        (["--config.optim.learning_rate=0.5"], "config.optim.learning_rate: "),
        (["--config.data.path=other.txt"], "the text: "),
    ],
)
def test_processes_that_were_told_different_things_stop(tmp_path, own, words):
    given = runs.arguments(tmp_path, tmp_path / "job")
    runs.write_text(tmp_path / "other.txt", words=3000)
    own = [text.replace("other.txt", str(tmp_path / "other.txt")) for text in own]
    job = runs.job(tmp_path / "logs", 2, given, own=([], own))
    finish(job, [2, 2])
    for process in job:
        assert process.err.splitlines()[-1].startswith(
            f"gpt-jax: {words}not the same on all processes of this job"
        )


def test_processes_with_different_numbers_of_devices_stop(tmp_path):
    job = runs.job(
        tmp_path / "logs",
        2,
        runs.arguments(tmp_path, tmp_path / "job"),
        own=([], ["--cpu_devices=2"]),
    )
    finish(job, [2, 2])
    for process in job:
        assert process.err.splitlines()[-1] == (
            "gpt-jax: the processes of this job have different numbers of devices: process 0 has "
            "1, process 1 has 2; give "
            "each the same --cpu_devices, or as many accelerators"
        )


def test_the_same_source_is_the_same_code_with_and_without_git(monkeypatch, tmp_path):
    same, said = version.code_identity(), version.code_version()
    assert (version.PACKAGE / "commands/main.py").exists()  # the whole package counts
    for commit in ("", "0123456789+"):
        monkeypatch.setattr(version, "git_commit", lambda folder: commit)
        assert version.code_identity() == same and version.code_version().endswith(
            said[said.index("source ") :]
        )
    assert "0123456789+" in version.code_version()
    monkeypatch.setattr(version, "PACKAGE", tmp_path)
    assert version.code_identity() != same


def test_processes_that_do_not_meet_say_so(tmp_path):
    given = runs.arguments(
        tmp_path,
        tmp_path / "job",
        "--join_seconds=3",
        "--coordinator=127.0.0.1:1",
        "--num_processes=2",
        "--process_id=1",
    )
    process = runs.Process(tmp_path / "logs", given)
    process.end(40, 100)
    assert "--join_seconds=3" in process.err.splitlines()[-1] and "Traceback" not in process.err


def test_saved_on_eight_devices_measured_and_sampled_on_two_processes(tmp_path, capfdbinary):
    parts = runs.build(runs.load(tmp_path), 2, 2, 2)
    runs.run(parts, tmp_path / "run")
    capfdbinary.readouterr()
    job = runs.job(tmp_path / "logs", 2, ["evaluate", f"--checkpoint={tmp_path / 'run'}", "--json"])
    finish(job, [0, 0])
    found = runs.json.loads(job[0].out)["sources"]["held-out"]
    assert found["loss"] == pytest.approx(runs.curve(tmp_path / "run", "eval/loss")[20], rel=1e-6)
    assert job[1].out == ""

    given = [
        "generate",
        f"--checkpoint={tmp_path / 'run'}",
        "--prompt=ab",
        "--max_new_tokens=12",
        "--temperature=0",
    ]
    job = runs.job(tmp_path / "logs", 2, given)
    finish(job, [0, 0])
    runs.call(*given)
    assert (
        job[0].out.encode() == capfdbinary.readouterr().out and len(job[0].out) and job[1].out == ""
    )

    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"context": "ab", "choices": ["c", "de"], "gold": 0, "unconditional": "a"}\n')
    given = ["evaluate", f"--checkpoint={tmp_path / 'run'}", "--questions", str(asked), "--json"]
    job = runs.job(tmp_path / "logs", 2, given)
    finish(job, [0, 0])
    runs.call(*given)
    assert job[0].out.encode() == capfdbinary.readouterr().out and job[1].out == ""

    (tmp_path / "long.txt").write_text("to be or not to be, " * 100_000)  # minutes
    job = runs.job(
        tmp_path / "logs",
        2,
        ["evaluate", f"--checkpoint={tmp_path / 'run'}", f"--text={tmp_path / 'long.txt'}"],
    )
    job[0].until(lambda: "2,000,001 tokens" in job[0].err, "a word of the text")
    for process in job:
        process.signal(signal.SIGTERM)
    finish(job, [10, 10])
    assert all("gpt-jax: stopped on request" in process.err for process in job)
