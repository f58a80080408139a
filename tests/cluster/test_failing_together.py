"""One process of a job fails.

The others leave at once, say why, and have a code that a scheduler can use.
"""

import signal

import pytest
import runs
from runs import HOST

from gpt_jax.cluster.job import Membership
from gpt_jax.cluster.launch_local import find_free_port

# From a process's end to that of the others, who hear of it within seconds: 15 on machines of which
# this is the only job.
TOGETHER = 30
LONG = (
    "--config.train.steps=100000",
    "--config.eval.every_steps=0",
    "--config.checkpoint.every_steps=0",
)


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def said(process) -> list[str]:
    """The program's own lines on standard error."""
    return [line for line in process.err.splitlines() if line.startswith("gpt-jax: ")]


def test_who_is_silent_is_blamed_and_not_who_left_for_it():
    """Process 0 may be gone already, because it has heard of the silent one."""
    job = object.__new__(Membership)
    job.process = 2
    job.silent = [1]
    job.hosts = {1: "b"}
    job.address = f"127.0.0.1:{find_free_port()}"
    assert job.gone() == "a peer process is gone without a word: process 1 on b"
    job.silent = []
    assert "process 0 on " in job.gone()


CRASH = """
import sys
from gpt_jax.run import loop
from gpt_jax.commands import main
from gpt_jax.errors import SaveFailed
plain = loop.one_step
def one_step(run, state, step, columns, profile):
    if step == 8:
        raise {error}
    return plain(run, state, step, columns, profile)
loop.one_step = one_step
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "error, victim, codes",
    [
        ("ZeroDivisionError('by nothing')", 1, (1, 1)),
        ("SaveFailed('the disk is full')", 0, (50, 40)),
    ],
)
def test_a_failure_in_one_process_is_the_others_reason(tmp_path, error, victim, codes):
    """It fails in the middle of a collective.

    The others leave with 40 if a restart may help, and otherwise with the same code.
    """
    given = runs.arguments(tmp_path, tmp_path / "job", *LONG)
    python = [("-m", "gpt_jax")] * 2
    python[victim] = "-c", CRASH.format(error=error)
    job = runs.job(tmp_path / "logs", 2, given, python=python)
    job[victim].end(codes[0])
    job[1 - victim].end(codes[1], TOGETHER)
    (last,) = said(job[1 - victim])
    text = error.split("'")[1]

    assert last.startswith(
        f"gpt-jax: a peer process failed: process {victim} on {HOST}, exit code {codes[0]}: "
    )
    assert text in last
    assert ("Traceback" in job[victim].err) == (codes[0] == 1) and text in job[victim].err


LATE = """
import sys, time
from gpt_jax.run import loop
from gpt_jax.commands import main
def finish(*_):
    time.sleep(5)
    raise ZeroDivisionError("by nothing")
loop.finish = finish
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.deep)])
def test_a_failure_behind_the_save_of_a_stop_is_the_others_reason_too(tmp_path, victim):
    """The other process has saved, is done, and waits for this one."""
    python = [("-m", "gpt_jax")] * 2
    python[victim] = "-c", LATE
    job = runs.job(
        tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job", *LONG), python=python
    )
    job[0].until(runs.logged(tmp_path / "job", 10), "step 10")
    job[0].signal(signal.SIGTERM)
    job[victim].end(1)
    job[1 - victim].end(1, TOGETHER)
    *_, last = said(job[1 - victim])

    assert last.startswith(
        f"gpt-jax: a peer process failed: process {victim} on {HOST}, exit code 1: "
    )


EARLY = """
import os, sys, time
from gpt_jax.{room} import {module}
from gpt_jax.commands import main
plain = {module}.{name}
def first(*given, **named):
    os.kill(os.getpid(), {number})
    time.sleep(0.1)  # the others have to hear of it before an evaluation of 5 s is over
    return plain(*given, **named)
{module}.{name} = first
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.deep)]
)
def test_a_stop_before_the_loop_leaves_at_once(tmp_path, number):
    """It comes while the text is read, for example."""
    script = EARLY.format(room="run", module="parts", name="build", number=int(number))
    process = runs.Process(
        tmp_path / "logs", runs.arguments(tmp_path, tmp_path / "job", *LONG), ("-c", script)
    )
    process.end(10)
    assert said(process) == [
        "gpt-jax: stopped on request before the first step, nothing to save; the same command "
        "starts again"
    ]
    assert "Traceback" not in process.err and not (tmp_path / "job/config.json").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.deep)]
)
def test_a_stop_of_one_before_the_loop_stops_both_behind_its_first_steps(tmp_path, number):
    """This holds for a new run, and for the same run when it resumes."""
    python = [
        ("-m", "gpt_jax"),
        ("-c", EARLY.format(room="run", module="parts", name="build", number=int(number))),
    ]
    before = 0

    for _ in range(2):
        job = runs.job(
            tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job", *LONG), python=python
        )
        for process in job:
            process.end(10)
            (last,) = said(process)
            step = int(last.split("stopped on request after step ")[1].split()[0])
            assert before < step < before + 10
        before = step


def test_a_stop_of_one_in_an_evaluation_stops_both_there(tmp_path):
    given = runs.arguments(
        tmp_path,
        tmp_path / "job",
        "--config.train.steps=3",
        "--config.eval.batches=50",
        "--config.eval.batch_size=2",
        "--config.checkpoint.every_steps=0",
    )
    python = [
        ("-m", "gpt_jax"),
        (
            "-c",
            EARLY.format(
                room="evals", module="heldout", name="add_sums", number=int(signal.SIGTERM)
            ),
        ),
    ]
    for process in runs.job(tmp_path / "logs", 2, given, python=python):
        process.end(10)
        (last,) = said(process)
        assert "stopped on request after step 3 of 3, saved in" in last
    assert not runs.curve(tmp_path / "job", "eval/loss")

    for process in runs.job(tmp_path / "logs", 2, given):
        process.end(0)
    assert list(runs.curve(tmp_path / "job", "eval/loss")) == [3]


@pytest.mark.parametrize("victim", [0, 1])
def test_what_is_wrong_before_joining_ends_all(tmp_path, victim):
    own = [["--config.train.batch_size=0"] * (k == victim) for k in range(2)]
    job = runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job"), own=own)
    job[victim].end(2)
    job[1 - victim].end(2, TOGETHER)
    assert said(job[victim])[-1].startswith("gpt-jax: config.train.batch_size = 0")
    assert said(job[1 - victim])[-1].startswith(
        f"gpt-jax: process {victim} on {HOST} failed: config.train.batch_size = 0"
    )


def test_a_process_that_stands_still_is_missed(tmp_path):
    """It stands still as a whole, so that no connection closes. Only its heartbeats are missing."""
    job = runs.job(tmp_path / "logs", 2, runs.arguments(tmp_path, tmp_path / "job", *LONG))
    job[0].until(runs.logged(tmp_path / "job", 10), "step 10")
    job[1].signal(signal.SIGSTOP)  # no word, no closed connection: only silence
    job[0].end(40, 10 + TOGETHER)  # --heartbeat_seconds=10
    assert f"a peer process is gone without a word: process 1 on {HOST} (" in said(job[0])[-1]
    assert "Traceback" not in job[0].err


OTHER_CODE = """
import sys
from gpt_jax.cluster import code as version
from gpt_jax.commands import main
version.source_digest = lambda folder: "0ddc0de0"
main.main(sys.argv[1:])
"""


def test_processes_with_different_code_say_which_they_have(tmp_path):
    job = runs.job(
        tmp_path / "logs",
        2,
        runs.arguments(tmp_path, tmp_path / "job"),
        python=[("-m", "gpt_jax"), ("-c", OTHER_CODE)],
    )

    for k, process in enumerate(job):
        process.end(2)
        line = said(process)[-1]
        assert line.startswith(
            "gpt-jax: the code (source digest and jax version): not the same on all processes"
        )
        assert (
            "install the same gpt_jax and jax on every host" in line
            and f"this is process {k} on {HOST}" in line
        )
        assert ("source 0ddc0de0" in line) == (k == 1)
