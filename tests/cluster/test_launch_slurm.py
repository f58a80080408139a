"""Places of tasks under SLURM, and what submitit is given.

launch/slurm_test.sh is the test with a real SLURM.
"""

import os

import jax
import pytest
import runs
from launchers import LLAMA_RUN

from gpt_jax import errors
from gpt_jax.cluster import JobFlags, join, launch_slurm, place

SLURM = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
ALONE = JobFlags(distributed=True)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[001,007-015],host2", "n001"),
        ("n[07]", "n07"),
        ("r[01-02]s[3,5],x", "r01s3"),
        ("gpu-a[3-4]-ib", "gpu-a3-ib"),
        ("a.b.c,d", "a.b.c"),
    ],
)
def test_first_host_of_slurms_lists(nodes, first):
    assert place.first_host(nodes) == first


def test_place_under_slurm():
    assert place.place_of(ALONE, SLURM)[:3] == ("n1:21234", 16, 9)
    assert place.place_of(ALONE, {}) is None
    with pytest.raises(
        errors.UsageError, match=r"not under srun .SLURM_STEP_NODELIST, .*; start it by `srun"
    ):
        place.place_of(ALONE, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


def test_jobs_of_slurm_do_not_share_a_secret():
    """Not even those whose numbers share a port, and not without a secret of the launcher."""
    secrets = {
        place.place_of(ALONE, SLURM | more).secret
        for more in ({}, {"SLURM_JOB_ID": "41234"}, {"GPT_JAX_JOB": "x"}, {"GPT_JAX_JOB": "y"})
    }
    assert len(secrets) == 4
    given = JobFlags("h:1", 2, 1)
    assert place.place_of(given, {"GPT_JAX_JOB": "x"}) == ("h:1", 2, 1, "x")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"SLURM_NODEID": "2"}, "SLURM_STEP_TASKS_PER_NODE=8(x2): says nothing of node 2"),
        ({"SLURM_LOCALID": "a"}, "SLURM_LOCALID=a: expected a whole number"),
        ({"SLURM_JOB_ID": "31234_1"}, "SLURM_JOB_ID=31234_1: expected a whole number"),
    ],
)
def test_an_environment_that_srun_does_not_make_is_refused(wrong, words):
    with pytest.raises(errors.UsageError) as refused:
        place.own_devices(ALONE, SLURM | wrong)
        place.place_of(ALONE, SLURM | wrong)
    assert str(refused.value).startswith(words)


ONE = SLURM | {
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}


def test_a_job_of_one_task_trains(tmp_path):
    given = runs.arguments(tmp_path, tmp_path / "job", "--config.train.steps=2")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE.items():
            patch.setenv(name, value)
        process = runs.Process(tmp_path / "logs", [*given, "--distributed", "--join_seconds=20"])
    process.end(0)
    assert list(runs.curve(tmp_path / "job")) == [1, 2]


EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, [1]),
        (EIGHT, [1]),
        ({"SLURM_GPUS_ON_NODE": "8"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "3,4", "SLURM_GPUS_ON_NODE": "8"}, None),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, [4, 5, 6, 7]),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_NODEID": "1"}, [4, 5, 6, 7]),
        (EIGHT | {"SLURM_STEP_TASKS_PER_NODE": "1(x3),4(x2),2", "SLURM_NODEID": "4"}, [2, 3]),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, [2, 3]),
    ],
)
def test_a_slurm_task_takes_its_part_of_the_gpus(environ, wanted):
    assert place.own_devices(ALONE, SLURM | environ) == wanted
    assert place.own_devices(ALONE, environ) is None  # not a task of SLURM


@pytest.mark.parametrize("device, wanted", [(None, None), (3, [3])])
def test_a_tpu_pods_place_is_left_to_jax(device, wanted, monkeypatch):
    """Only the devices of --local_device and the time to wait are given."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **more: given.update(more))
    for name in ("keep_stdout", "leave_on_abort"):
        monkeypatch.setattr(join, name, lambda *_: None)
    monkeypatch.setattr("jax.experimental.multihost_utils.sync_global_devices", lambda name: None)
    flags = ALONE._replace(local_device=device, join_seconds=7, heartbeat_seconds=3)
    join.join_job(flags, {})
    assert {name: value for name, value in given.items() if value is not None} == {
        "initialization_timeout": 7,
        "heartbeat_timeout_seconds": 3,
    } | ({"local_device_ids": wanted} if wanted else {})


@pytest.mark.parametrize("gpus, tasks", [(4, 8), (8, 3)])
def test_gpus_that_cannot_be_dealt_evenly(gpus, tasks):
    with pytest.raises(errors.UsageError, match=f"^{gpus} GPUs on this node for {tasks} tasks"):
        place.own_devices(
            ALONE,
            SLURM | {"SLURM_GPUS_ON_NODE": str(gpus), "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)"},
        )
    assert runs.refusal(
        "launch",
        "slurm",
        "--time=9",
        f"--gpus_per_node={gpus}",
        f"--tasks_per_node={tasks}",
        "train",
    ) == (2, f"--tasks_per_node={tasks}: {gpus} GPUs of a node cannot be shared by so many evenly")


def test_what_submitit_is_given(tmp_path, monkeypatch):
    """A stand-in for sbatch gets this batch script."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\ncat "$1" > {tmp_path}/script\necho Submitted batch job 42\n'
    )
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    for name in ("sbatch", "srun"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    runs.call(
        "launch",
        "slurm",
        "--nodes=2",
        "--gpus_per_node=8",
        "--time=60",
        "--partition=p",
        "--sbatch",
        "mem=64G",
        f"--logs={tmp_path}/logs",
        "--",
        *LLAMA_RUN,
    )
    script = (tmp_path / "script").read_text()
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=60",
        "partition=p",
        "mem=64G",
        "requeue",
        f"signal=USR1@{launch_slurm.SLURM_SAVE_SECONDS}",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert launch_slurm.afterwards(20) in script and script.index("trap '' TERM") < script.index(
        "\nsrun "
    )
