"""A real SLURM of two nodes: submit, train on two tasks, preempt, requeue, resume.

pytest does not collect this file. launch/slurm_test.sh makes that SLURM and runs it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

SECONDS = 600  # of a state that does not come: a hang


@pytest.fixture(autouse=True)
def clean():
    yield
    runs.kill_all()
    slurm("scancel", "--user=root")


def slurm(*words) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def fact(job: str, name: str) -> str:
    return slurm("scontrol", "show", "job", job).split(f" {name}=")[1].split()[0]


def until(reached, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < end, (
            f"no {what} within {SECONDS} s\n{slurm('squeue')}\n"
            + "".join(path.read_text() for path in Path(os.environ["GPT_JAX_SLURM"]).glob("out/*"))
        )
        time.sleep(0.2)


def again(job: str) -> None:
    """Waits until the job is back from the queue.

    SLURM first lets its old credentials run out, which takes 15 s as configured here.
    """
    until(lambda: fact(job, "JobState") == "RUNNING", "start")


@pytest.fixture
def out():
    """The file that tasks write to."""
    folder = Path(os.environ["GPT_JAX_SLURM"]) / "out"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


STEPS = (
    "--config.checkpoint.every_steps=100",
    "--config.eval.every_steps=0",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.log.every_steps=1",
)


def test_submitted_preempted_requeued_resumed(tmp_path, out):
    """A request to save, a job that goes before, and an operator interrupt it.

    The losses are those of a run that was never stopped.
    """
    given = runs.arguments(tmp_path, tmp_path / "job", *STEPS, "--config.train.steps=600")
    said = slurm(
        sys.executable,
        "-m",
        "gpt_jax",
        "launch",
        "slurm",
        "--nodes=2",
        "--tasks_per_node=1",
        "--time=600",
        "--partition=low",
        f"--logs={out}",
        "--",
        *given,
        "--cpu_devices=1",
    )
    job = said.split()[2].rstrip(";")
    done = 0
    for number, stop in enumerate(
        (
            lambda: slurm("scancel", "--signal=USR1", job),
            lambda: slurm(
                "sbatch", "--partition=high", "--nodes=2", f"--output={out}/high", "--wrap=sleep 1"
            ),
            lambda: slurm("scontrol", "requeue", job),
        )
    ):
        until(runs.logged(tmp_path / "job", done + 30), f"step {done + 30}")
        stop()
        until(lambda: fact(job, "Restarts") == str(number + 1), f"restart {number + 1}")
        again(job)
        log = "".join(path.read_text() for path in sorted(out.glob(f"{job}*.out")))
        assert log.count("stopped on request after step") >= 2 * (number + 1), log  # both tasks
        done = int(log.split("stopped on request after step ")[-1].split()[0])
    until(lambda: fact(job, "JobState") in ("COMPLETED", "FAILED"), "end")
    log = "".join(path.read_text() for path in sorted(out.glob(f"{job}*.out")))
    assert fact(job, "JobState") == "COMPLETED", log
    assert log.count("resumed from step") == 3 and "process 1 of 2 on " in log

    whole = runs.job(
        tmp_path / "logs",
        2,
        runs.arguments(tmp_path, tmp_path / "whole", *STEPS, "--config.train.steps=600"),
    )
    for process in whole:
        process.end(0, SECONDS)
    assert (
        runs.curve(tmp_path / "job") == runs.curve(tmp_path / "whole")
        and len(runs.curve(tmp_path / "job")) == 600
    )


def batch(out, *given) -> str:
    """A job of launch/slurm.sbatch on two tasks."""
    program = out.parent / "gpt-jax"
    program.write_text(
        f'#!/bin/sh\nexport PYTHONPATH={runs.ROOT}\nexec {sys.executable} -m gpt_jax "$@"\n'
    )
    program.chmod(0o755)

    return slurm(
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=600",
        "--partition=low",
        f"--output={out}/batch",
        f"--export=ALL,GPT_JAX={program}",
        runs.ROOT / "launch/slurm.sbatch",
        *given,
        "--cpu_devices=1",
    ).strip()


def test_a_usage_error_is_not_tried_again(tmp_path, out):
    job = batch(
        out, *runs.arguments(tmp_path, tmp_path / "job", "--config.optim.optimizer=nonsense")
    )
    until(lambda: fact(job, "JobState") == "FAILED", "end")
    assert fact(job, "ExitCode") == "2:0" and fact(job, "Restarts") == "0"
    assert "exit code 2: a restart would not help" in (out / "batch").read_text()


def test_a_killed_task_is_started_again_and_a_cancelled_job_is_not(tmp_path, out):
    job = batch(
        out, *runs.arguments(tmp_path, tmp_path / "job", *STEPS, "--config.train.steps=100000")
    )
    until(runs.logged(tmp_path / "job", 20), "step 20")
    victim = next(
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal()
        and b"SLURM_PROCID=1" in (content := Path(f"/proc/{pid}/environ").read_bytes()).split(b"\0")
        and f"SLURM_JOB_ID={job}".encode() in content.split(b"\0")
    )
    os.kill(victim, 9)
    until(lambda: fact(job, "Restarts") == "1", "restart")
    again(job)
    until(lambda: (out / "batch").read_text().count("process 1 of 2 on ") == 2, "second start")
    until(runs.logged(tmp_path / "job", 40), "step 40")
    slurm("scancel", job)
    until(lambda: fact(job, "JobState") == "CANCELLED", "end")
    until(
        lambda: (out / "batch").read_text().count("stopped on request after step") == 2,
        "a save at the end",
    )
    time.sleep(3)

    assert fact(job, "JobState") == "CANCELLED" and fact(job, "Restarts") == "1"
