"""`gpt-jax launch local`: processes that start, end and start again together.

Most tests have small stand-ins for the program. One has a real run.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import runs

from gpt_jax import errors
from gpt_jax.cluster import launch_local
from gpt_jax.commands import launch as commands

TWO = launch_local.LocalGroup(2, 1)


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def launch(monkeypatch, scripts, restarts=0, said=None, waited=None):
    """Runs Python snippets as processes through `local.run`, with one list for each attempt.

    `waited` gets for how many restarts each wait was.
    """
    asked = waited if waited is not None else []
    attempts = iter(scripts)
    monkeypatch.setattr(
        launch_local,
        "command_lines",
        lambda *_: [[sys.executable, "-c", text] for text in next(attempts)],
    )
    monkeypatch.setattr(
        launch_local, "restart_seconds", lambda restarts: asked.append(restarts) or 0.01
    )
    return launch_local.run_processes(TWO, [], restarts, (said if said is not None else []).append)


WAIT = "import time; time.sleep(600)"


@pytest.mark.parametrize(
    "scripts, restarts, code, words",
    [
        ([["", ""]], 0, 0, "done"),
        ([["exit(40)", "exit(2)"]], 3, 2, "process 1 ended first: exit code 2 (config or usage"),
        ([["exit(1)", "exit(1)"]], 3, 1, "exit code 1 (a bug); a restart would not help"),
        ([["exit(50)", "exit(40)"], ["", ""]], 1, 0, "done"),
        ([["exit(41)", "exit(41)"]] * 3, 2, 41, "no restarts left of 2"),
        (
            [["exit(40)", "import os; os.kill(os.getpid(), 9)"]],
            0,
            40,
            "process 1 was killed by SIGKILL: exit code 40",
        ),
    ],
)
def test_restarts_by_the_policy(monkeypatch, scripts, restarts, code, words):
    said = []
    found, line = launch(monkeypatch, scripts, restarts, said)
    assert found == code and words in line and len(said) == len(scripts) - 1


@pytest.mark.parametrize("quiet, waits", [(-1, [0, 0, 0]), (600, [0, 1, 2])])
def test_a_long_attempt_resets_the_wait_and_not_the_limit(monkeypatch, quiet, waits):
    asked = []
    monkeypatch.setattr(launch_local, "QUIET_SECONDS", quiet)
    code, line = launch(monkeypatch, [["exit(41)"]] * 4, 3, waited=asked)
    assert code == 41 and line.endswith("no restarts left of 3") and asked == waits


def test_who_stays_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(launch_local, "TOGETHER_SECONDS", 0.5)
    said = []
    code, line = launch(
        monkeypatch, [[WAIT, "print('my reason', flush=True); exit(20)"]], said=said
    )
    assert (
        code == 20
        and "process 1 ended first: exit code 20" in line
        and "process 0 is still there" in said[0]
    )
    assert "[1] my reason" in capfd.readouterr().err

    # The log has the reason of process 1, and not that 0 was killed here.
    code, line = launch(monkeypatch, [[WAIT, "exit(40)"]])
    assert code == 40 and "process 1 ended first: exit code 40" in line


@pytest.mark.parametrize("number", launch_local.REQUESTS)
def test_requests_reach_all_and_end_the_restarts(monkeypatch, tmp_path, number):
    """A terminal that closes sends SIGHUP, and the processes get the request that they know."""
    obedient = (
        "import signal, sys, time, pathlib; signal.signal({0}, lambda *_: sys.exit(10)); "
        "pathlib.Path({1!r}).touch(); time.sleep(600)"
    )
    marks = [tmp_path / name for name in "ab"]

    def ask():
        while not all(mark.exists() for mark in marks):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    wanted = launch_local.REQUESTS[number]
    threading.Thread(target=ask).start()
    with runs.own_signals():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        code, line = launch(
            monkeypatch,
            [[obedient.format(int(wanted), str(mark)) for mark in marks]] * 2,
            restarts=5,
        )
    assert code == 10 and "asked to stop" in line


def test_a_closed_terminal_is_ignored_under_nohup():
    with runs.own_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with launch_local.pass_on_requests():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


LAUNCHER = """
import pathlib, sys
from gpt_jax.cluster import launch_local
child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); "
child += "time.sleep(600)"
lines = [[sys.executable, "-c", child, name] for name in sys.argv[1:]]
launch_local.command_lines = lambda *_: lines
launch_local.run_processes(launch_local.LocalGroup(2, 1), [], 0, print)
"""


def is_alive(process: int) -> bool:
    """Whether a process runs, and is not only a name that its parent has not taken yet."""
    try:
        status = open(f"/proc/{process}/stat").read()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a request of Linux")
def test_a_killed_launcher_leaves_no_process_behind(tmp_path):
    marks = [tmp_path / name for name in "ab"]
    launcher = runs.Process(tmp_path / "logs", marks, ("-c", LAUNCHER))
    launcher.until(lambda: all(mark.exists() and mark.read_text() for mark in marks), "children")
    children = [int(mark.read_text()) for mark in marks]
    assert all(map(is_alive, children))

    launcher.kill()
    end = time.monotonic() + 20
    while any(map(is_alive, children)):
        assert time.monotonic() < end, "the children live on"
        time.sleep(0.02)


def test_a_process_whose_output_nobody_takes_runs_on(monkeypatch):
    """As with `2>&1 | head -1`: the output is more than a pipe holds."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        talk = "for _ in range(9): print('x' * 99999, flush=True)"
        assert launch(monkeypatch, [["", talk]]) == (0, "done")
        assert sys.stderr is not closed  # Python would complain at the end.


def test_what_a_dead_process_has_left_behind_does_not_hold_the_launcher(monkeypatch):
    """A worker of the process has its pipe."""
    monkeypatch.setattr(launch_local, "READ_SECONDS", 0.5)
    worker = "import time; time.sleep(20)"
    began = time.monotonic()
    leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {worker!r}])"
    assert launch(monkeypatch, [["", leave]])[0] == 0
    assert time.monotonic() - began < 15


def test_the_processes_of_a_machine_share_a_secret():
    own = launch_local.add_secret({"A": "b"}, 1)
    assert own["A"] == "b" and len(own["GPT_JAX_JOB"]) == 32
    assert own != launch_local.add_secret({"A": "b"}, 1)
    # What is given stays, and the launchers of several machines have nothing in common but that.
    assert launch_local.add_secret({"GPT_JAX_JOB": "x"}, 1) == {"GPT_JAX_JOB": "x"}
    assert launch_local.add_secret({"A": "b"}, 2) == {"A": "b"}


@pytest.mark.parametrize("which", [0, 1])
def test_a_request_between_two_starts_reaches_all(monkeypatch, which):
    """It comes when process `which` has been made and nobody knows of it yet."""

    class Popen(subprocess.Popen):
        made = 0

        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            Popen.made += 1
            if Popen.made == which + 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch_local.subprocess, "Popen", Popen)
    with runs.own_signals():
        code, line = launch(monkeypatch, [[WAIT, WAIT]], restarts=5)
    assert code == 40 and "killed by SIGTERM" in line and line.endswith("asked to stop")


def test_places_of_the_processes_of_a_node():
    lines = launch_local.command_lines(
        launch_local.LocalGroup(2, 0, "h:1", nodes=3, node=1), ["train", "--x"]
    )

    assert [line[1:] for line in lines] == [
        [
            "-m",
            "gpt_jax",
            "train",
            "--x",
            "--coordinator=h:1",
            "--num_processes=6",
            f"--process_id={2 + k}",
            f"--local_device={k}",
        ]
        for k in range(2)
    ]
    assert launch_local.command_lines(launch_local.LocalGroup(1, 0), ["train"])[0][1:] == [
        "-m",
        "gpt_jax",
        "train",
    ]
    assert launch_local.command_lines(launch_local.LocalGroup(1, 4), ["train"])[0][1:] == [
        "-m",
        "gpt_jax",
        "train",
        "--cpu_devices=4",
    ]


@pytest.mark.parametrize(
    "shape, devices",
    [
        ([], 0),
        (["--devices_per_process=4"], 4),
        (["--processes=2"], 2),
        (["--processes=2", "--devices_per_process=4"], 8),
        (["--nodes=2"], 0),
        (["--nodes=2", "--devices_per_process=4"], 8),
        (["--nodes=2", "--processes=8"], 16),
    ],
)
def test_devices_of_the_job_are_known_or_0(monkeypatch, shape, devices):
    """The only process of a machine takes all that the machine has, as `command_lines` says."""
    found = []
    monkeypatch.setattr(commands, "check_train", lambda command, count: found.append(count))
    monkeypatch.setattr("gpt_jax.cluster.run_processes", lambda *_: (0, ""))
    runs.call("launch", "local", *shape, *["--coordinator=a:1"] * ("--nodes=2" in shape), "train")
    assert found == [devices]


def test_a_killed_process_and_the_job_starts_again_and_resumes(tmp_path):
    """This is the real program. Its flags and the launcher's may come in any order."""
    given = runs.arguments(
        tmp_path,
        tmp_path / "job",
        "--config.train.steps=60",
        "--config.checkpoint.every_steps=10",
        "--config.eval.every_steps=0",
        "--processes=2",
    )
    job = runs.Process(
        tmp_path / "logs", ["launch", "local", "--restarts=1", *given, "--devices_per_process=1"]
    )
    job.until(runs.logged(tmp_path / "job", 20), "step 20")
    found = subprocess.run(
        ["ps", "-ww", "--ppid", str(job.popen.pid), "-o", "pid=,args="],
        capture_output=True,
        text=True,
    )
    victim = next(line for line in found.stdout.splitlines() if "--process_id=1" in line)
    os.kill(int(victim.split()[0]), signal.SIGKILL)
    job.end(0)

    assert "resumed from step" in job.out and list(runs.curve(tmp_path / "job")) == list(
        range(1, 61)
    )
    assert (
        "gpt-jax: launch: process 1 was killed by SIGKILL: exit code 40 "
        f"({errors.EXIT_CODES[40]}); restart 1 of 1 in "
        f"{errors.restart_seconds(0)} s"
    ) in job.err
    assert "[1] " in job.err


@pytest.mark.parametrize(
    "given, words",
    [
        (["--processes=0", "train"], "--processes=0: expected 1"),
        (["--restarts=-1", "train"], "--restarts=-1: expected 0"),
        (["--nodes=2", "train"], "--nodes=2: needs --coordinator"),
        (["--node=1", "train"], "--node=1: expected 0 to 0"),
        (["--nodes=2", "--coordinator=a:1", "--restarts=1", "train"], "--restarts=1: one machine"),
        (["--devices_per_process=2000", "train"], "--devices_per_process=2000: expected 0 to 1024"),
        (["--processes=1000", "train"], "--processes=1000: expected 1 to 256"),
        (["--coordinator=abc", "train"], "--coordinator=abc: expected HOST:PORT"),
        (["train", "--process_id=1"], "--process_id: the launcher gives"),
        (["prepare"], "gpt-jax launch local: 'prepare'"),
    ],
)
def test_bad_flags(given, words):
    code, text = runs.refusal("launch", "local", *given)
    assert code == 2 and text.startswith(words)


@pytest.mark.parametrize(
    "given", [("launch", "local"), ("launch", "slurm"), ("launch", "kubernetes"), ("plan",)]
)
def test_every_flag_has_a_text(given, capsys):
    with pytest.raises(SystemExit):
        runs.call(*given, "--help")
    text = capsys.readouterr().out
    assert "(default: )" not in text and "--inside" not in text
    flags = re.split(r"\n  (?=-)", text)[1:]
    assert len(flags) > 4 and not [
        flag for flag in flags if len(re.sub(r"\(default: .*?\)", "", flag).split()) < 3
    ]


def test_unknown_engine_and_help(capsys):
    assert runs.refusal("launch", "pbs") == (
        2,
        "unknown engine 'pbs': choose one of local, slurm, kubernetes",
    )
    with pytest.raises(SystemExit) as ended:
        runs.call("launch", "--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in text for name in ("local", "slurm", "kubernetes"))
