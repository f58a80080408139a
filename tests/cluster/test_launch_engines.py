"""Launchers of engines that are not here: what they write and run, against schemas and stand-ins.

SLURM has a test of its own, launch/slurm_test.sh. No image was built, and no cluster of Kubernetes
or TPUs was used.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib

import forks
import jax
import pytest
import runs
import yaml

from gpt_jax import errors
from gpt_jax.cluster import JobFlags, join, launch_kubernetes, launch_slurm, place
from gpt_jax.commands import launch
from gpt_jax.hardware.chips import CHIPS

LAUNCH = runs.ROOT / "launch"


# ---- one restart policy ----


def test_every_launcher_restarts_on_the_same_codes():
    codes = errors.RESTARTABLE + errors.SIGNALLED
    first, most = errors.RESTART_SECONDS
    assert set(errors.RESTARTABLE) == {10, 40, 41, 42, 50} <= set(errors.EXIT_CODES)
    assert launch_slurm.afterwards("$restarts") in (LAUNCH / "slurm.sbatch").read_text()
    assert (
        f'restartable=" {" ".join(map(str, codes))} " first={first} most={most}'
        in (LAUNCH / "tpu_pod.sh").read_text()
    )
    waits = [errors.restart_seconds(k) for k in range(40)]
    assert (
        waits[:3] == [first, 2 * first, 4 * first] and waits == sorted(waits) and waits[-1] == most
    )


# ---- Kubernetes ----

TRAIN = [
    "train",
    "--config=configs/llama.py:1b",
    "--workdir=/data/run",
    "--config.data.path=/data/text",
    "--config.train.accumulate=2",
    "--config.eval.batch_size=512",
]


def manifest(*given) -> dict:
    """What `gpt-jax launch kubernetes` prints."""
    more = ["--config.mesh.dcn_data=2"] if "--slices=2" in given else []
    done = forks.run(
        [
            os.sys.executable,
            "-m",
            "gpt_jax",
            "launch",
            "kubernetes",
            "--image=repo/gpt-jax:1",
            *(() if any("--volume" in flag for flag in given) else ("--volume=claim:/data",)),
            *given,
            "--",
            *TRAIN,
            *more,
        ],
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


LLAMA = f"--config={runs.ROOT}/configs/llama.py:1b"
LLAMA_RUN = ["train", LLAMA, "--workdir=/w/runs", "--config.data.path=/w/text"]
KINDS = {
    "gpu": ["--nodes=4", "--gpus_per_node=8", "--volume=disk:/data", "--env=NCCL_DEBUG=INFO"],
    "tpu": ["--tpu_topology=v5p:4x4x4"],
    "slices": ["--tpu_topology=v6e:4x4", "--slices=2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_jobset_is_one_by_its_schema(kind):
    """It fits the models that Kubeflow generates from the JobSet and Kubernetes APIs.

    They would lose an unknown key.
    """
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    made = manifest(*KINDS[kind])
    assert json.loads(JobsetV1alpha2JobSet.from_dict(made).to_json()) == made
    broken = json.loads(json.dumps(made))
    broken["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    assert json.loads(JobsetV1alpha2JobSet.from_dict(broken).to_json()) != broken


def parts(made):
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    return job, spec, spec["template"]["spec"], spec["template"]["spec"]["containers"][0]


def test_jobset_stops_and_restarts_by_exit_code():
    for given in KINDS.values():
        made = manifest(*given, "--restarts=7", "--grace_seconds=900")
        _, spec, pod, _ = parts(made)
        assert made["spec"]["failurePolicy"]["maxRestarts"] == 7 and spec["backoffLimit"] == 0
        assert pod["terminationGracePeriodSeconds"] == 900 and pod["restartPolicy"] == "Never"
        disrupted, hopeless = spec["podFailurePolicy"]["rules"]
        assert disrupted["action"] == "Count" and hopeless["action"] == "FailJob"
        assert hopeless["onExitCodes"] == {
            "containerName": "gpt-jax",
            "operator": "NotIn",
            "values": sorted(errors.RESTARTABLE + errors.SIGNALLED),
        }
        assert [
            (rule["action"], rule["onJobFailureReasons"])
            for rule in made["spec"]["failurePolicy"]["rules"]
        ] == [("FailJobSet", ["PodFailurePolicy"])]


def test_gpu_pods_find_pod_0():
    job, spec, pod, box = parts(manifest(*KINDS["gpu"], "--name=llama"))
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["completionMode"]) == (
        1,
        4,
        4,
        "Indexed",
    )
    assert box["command"][3:] == [
        "gpt-jax",
        "launch",
        "local",
        "--processes=8",
        "--nodes=4",
        "--node=$(NODE)",
        f"--coordinator=llama-{job['name']}-0-0.llama:8476",
        *TRAIN,
    ]
    names = [item["name"] for item in box["env"]]
    assert names == ["RESTART_ATTEMPT", "NODE", "GPT_JAX_JOB", "NCCL_DEBUG"]
    assert box["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "volume-0", "persistentVolumeClaim": {"claimName": "disk"}} in pod["volumes"]


# Texts that YAML 1.1 or YAML 1.2 takes for something else where they have no quotes.
NO_WORDS = (
    *("y", "n", "Y", "No", "on", "off", "true", "null", "~", "", " ", "a: b", "- a", "# a", "[1]"),
    *(
        "1e3",
        "0o17",
        "017",
        "0x1F",
        "0b1",
        "1_000",
        "1:30",
        "1.",
        ".5",
        "+1",
        ".inf",
        ".NaN",
        "=",
        "<<",
    ),
    *("2001-01-01", "a\nb", "a\nb\n", " a\nb\n", "\ta\n", "\n", "é", "\x85", "\u2028", '"', "\\"),
    *("x" * 300 + " " + "y" * 300, "a\n" + "b " * 200 + "\n"),
)


def test_every_text_of_a_manifest_is_text_to_every_reader():
    """kubectl reads by other rules than PyYAML writes, and they differ in words without quotes."""
    env = [{"name": f"N{k}", "value": text} for k, text in enumerate(NO_WORDS)]
    made = {"y": env, "count": 3, "whole": True, "least": 0, "below": -1}
    text = launch_kubernetes.dump_yaml(made)
    assert yaml.safe_load(text) == made  # by the rules of YAML 1.1

    # By those of YAML 1.2, and of 1.1 too, these are numbers and truth values; all else is quoted.
    scalars = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    plain = [token.value for token in scalars if token.plain]
    assert plain == ["3", "true", "0", "-1"]
    assert {token.style for token in scalars if not token.plain} == {'"', "|"}


def test_variables_of_a_pod_are_text(capsys):
    given = ["DEBUG=y", "QUIET=n", "RATE=1e3", "MODE=0o17", "Y=1"]
    runs.call(
        "launch",
        "kubernetes",
        "--image=i",
        "--gpus_per_node=1",
        *(f"--env={text}" for text in given),
        "--",
        "evaluate",
    )
    out = capsys.readouterr().out
    for text in given:
        name, _, value = text.partition("=")
        assert f'"name": "{name}"\n' in out and f'"value": "{value}"\n' in out


@pytest.mark.parametrize("gpus, tpu", [(1, None), (0, "v6e:4x4")])
def test_a_dollar_in_the_command_is_one_in_the_pod(gpus, tpu):
    """Kubernetes fills in $(NAME), and takes $$ for a dollar."""
    made = launch_kubernetes.make_jobset(
        launch_kubernetes.KubernetesOptions("i", "n", 1, gpus, tpu, 1, 0, 0),
        ["train", "--config.a=$(NODE)$1"],
    )
    assert "--config.a=$$(NODE)$$1" in parts(made)[3]["command"]


def test_volumes_have_names_of_their_own_and_several_paths():
    given = ("my.claim-1:/data", "shared-memory:/text", "my.claim-1:/cache/")
    pod = launch_kubernetes.container(
        launch_kubernetes.KubernetesOptions("i", "n", 1, 1, None, 1, 0, 0, given), [], {}, []
    )
    own, *volumes = pod["volumes"]
    assert {item["name"]: item["persistentVolumeClaim"]["claimName"] for item in volumes} == {
        "volume-0": "my.claim-1",
        "volume-1": "shared-memory",
    }
    assert [(item["name"], item["mountPath"]) for item in pod["containers"][0]["volumeMounts"]] == [
        (own["name"], "/dev/shm"),
        ("volume-0", "/data"),
        ("volume-1", "/text"),
        ("volume-0", "/cache"),
    ]
    assert f"WORKDIR {launch_kubernetes.RESERVED[3]}\n" in (LAUNCH / "Dockerfile").read_text()


def test_pods_wait_before_a_restart(tmp_path):
    """They wait as long as the policy says, by JobSet's count.

    The command after it is unchanged.
    """
    for name, line in (
        ("sleep", f'echo "$1" >> {tmp_path}/waits'),
        ("gpt-jax", 'printf "%s|" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for attempt in ("", "0", *map(str, range(1, 40))):
        done = subprocess.run(
            launch_kubernetes.wait_before(["gpt-jax", "train", "a b", ""]),
            capture_output=True,
            text=True,
            env=env | {"RESTART_ATTEMPT": attempt},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "train|a b||", "")
    assert list(map(int, (tmp_path / "waits").read_text().split())) == [
        errors.restart_seconds(k) for k in range(39)
    ]


def test_a_pod_that_waits_can_be_ended(tmp_path):
    (tmp_path / "sleep").write_text(
        f"#!/bin/sh\ntouch {tmp_path}/waits\nexec {shutil.which('sleep')} 600\n"
    )
    (tmp_path / "sleep").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RESTART_ATTEMPT": "9"}
    process = subprocess.Popen(
        launch_kubernetes.wait_before(["false"]), env=env, start_new_session=True
    )
    while not (tmp_path / "waits").exists():
        time.sleep(0.02)
    process.terminate()
    try:
        assert process.wait(20) == 143
    finally:
        os.killpg(
            process.pid, signal.SIGKILL
        )  # its `sleep`; a container ends with its first process


def test_shapes_of_slices_have_the_dims_of_their_chips():
    chips = {name.lower(): chip for name, chip in CHIPS.items()}
    assert {name: dims for name, (_, _, dims) in launch_kubernetes.TPU_NODES.items()} == {
        name: chips[name].dims for name in launch_kubernetes.TPU_NODES
    }


@pytest.mark.parametrize(
    "topology, slices, machines, chips, label",
    [
        ("v5p:4x4x4", 1, 16, 4, "tpu-v5p-slice"),
        ("v6e:4x4", 2, 4, 4, "tpu-v6e-slice"),
        ("v6e:2x4", 1, 1, 8, "tpu-v6e-slice"),
        ("v5e:16x16", 1, 64, 4, "tpu-v5-lite-podslice"),
        ("v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice"),
    ],
)
def test_tpu_slices_become_machines(topology, slices, machines, chips, label):
    job, spec, pod, box = parts(manifest(f"--tpu_topology={topology}", f"--slices={slices}"))
    assert (job["replicas"], spec["parallelism"]) == (slices, machines)
    assert box["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert box["command"][-1] == "--distributed"


@pytest.mark.parametrize(
    "given, words",
    [
        ([], "--gpus_per_node=0 --tpu_topology=None: give one"),
        (["--gpus_per_node=8", "--slices=2"], "--slices=2: slices are"),
        (["--tpu_topology=v9:4x4"], "--tpu_topology=v9:4x4: expected KIND:"),
        (["--tpu_topology=v6e:4"], "--tpu_topology=v6e:4: expected v6e:NxN"),
        (["--tpu_topology=v5p:4x4"], "--tpu_topology=v5p:4x4: expected v5p:NxNxN"),
        (["--tpu_topology=v6e:4x4x4"], "--tpu_topology=v6e:4x4x4: expected v6e:NxN"),
        (["--tpu_topology=v6e:0x4"], "--tpu_topology=v6e:0x4: expected v6e:NxN"),
        (["--tpu_topology=v6e:3x3"], "--tpu_topology=v6e:3x3: 9 chips are no whole"),
        (["--gpus_per_node=-1"], "--gpus_per_node=-1: "),
        (["--tpu_topology=v6e:4x4", "--nodes=2"], "--nodes=2: "),
        (["--gpus_per_node=1", "--image="], "--image=: expected the name"),
        (["--gpus_per_node=1", "--image=a b"], "--image=a b: "),
        (["--gpus_per_node=1", "--name=A_b"], "--name=A_b: expected lower"),
        (["--gpus_per_node=1", "--volume=disk"], "--volume=disk: expected"),
        *(
            (["--gpus_per_node=1", f"--volume={text}"], f"--volume={text}: expected CLAIM:/PATH")
            for text in (
                "C_B:/data",
                "a..b:/data",
                "-a:/data",
                "a.:/data",
                f"{'a' * 254}:/data",
                "a:data",
                "a:/b:c",
                "a://b",
                ":/data",
            )
        ),
        *(
            (
                ["--gpus_per_node=1", f"--volume=c:{path}"],
                f"--volume=c:{path}: {taken} is taken by the pod itself",
            )
            for path, taken in (
                ("/dev/shm", "/dev/shm"),
                ("/dev/shm/", "/dev/shm"),
                ("/a/..", "/"),
                ("/gpt_jax", "/gpt_jax"),
            )
        ),
        (
            ["--gpus_per_node=1", "--volume=a:/v", "--volume=b:/v/"],
            "--volume=b:/v/: /v is taken by --volume=a:/v; choose",
        ),
        *(
            (["--gpus_per_node=1", f"--env={text}"], f"--env={text}: expected NAME=VALUE")
            for text in ("X", "9X=a", "=a", "A B=c", "A-B=c")
        ),
        (
            ["--gpus_per_node=1", "--env=NODE=3"],
            "--env=NODE=3: NODE is set by the launcher; leave it out",
        ),
        (
            ["--tpu_topology=v6e:4x4", "--env=RESTART_ATTEMPT=3"],
            "--env=RESTART_ATTEMPT=3: RESTART_ATTEMPT is set by the launcher",
        ),
        (["--gpus_per_node=1", "--env=A=1", "--env=A=2"], "--env=A=2: A is set twice"),
    ],
)
def test_bad_kubernetes_flags(given, words):
    code, text = runs.refusal(
        "launch", "kubernetes", "--image=x", *given, "--", "train", "--config=c.py"
    )
    assert code == 2 and text.startswith(words)


@pytest.mark.parametrize(
    "given, words",
    [
        (["--gpus_per_node=8", "--", "train", LLAMA], "--workdir is missing"),
        (["--gpus_per_node=8", "--", "train", LLAMA, "--workdir=/w"], "config.data.path is empty"),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN],
            "--workdir=/w/runs: lies in no --volume, and a pod's own disk is lost with it; "
            "as in --volume=CLAIM:/data -- train --workdir=/data/runs",
        ),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--workdir=runs/a"],
            "--workdir=runs/a: lies in no --volume",
        ),
        (
            ["--gpus_per_node=8", "--volume=a:/w", "--", *LLAMA_RUN, "--workdir=/w/../x"],
            "--workdir=/w/../x: lies in no --volume",
        ),
        (
            ["--gpus_per_node=8", "--volume=a:/w", "--", *LLAMA_RUN, "--workdir=///v/x"],
            "--workdir=///v/x: lies in no --volume",
        ),
        (["--gpus_per_node=8", "--", *LLAMA_RUN, "--join_seconds=0"], "--join_seconds=0: expected"),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--profile=9:1"],
            "--profile=9:1: expected START:STOP",
        ),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--print_config"],
            "--print_config: prints and trains nothing",
        ),
        (
            ["--gpus_per_node=8", "--volume=a:/v", "--volume=b:/wo", "--", *LLAMA_RUN],
            "--workdir=/w/runs: lies in no --volume",
        ),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--distributed"],
            "--distributed: the launcher gives it",
        ),
        (
            ["--gpus_per_node=8", "--", "train", "--workdir=/w", "--config=c.py"],
            "--config=c.py: no such file",
        ),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--config.trian.steps=1"],
            "config.trian = '1': unknown key",
        ),
        (["--gpus_per_node=8", "--", *LLAMA_RUN, "--steps=1"], "unknown argument '--steps=1'"),
        (
            ["--gpus_per_node=8", "--nodes=3", "--", *LLAMA_RUN],
            "config.model.embed = 2048: must be divisible by fsdp",
        ),
        (
            ["--tpu_topology=tpu7x:2x2x3", "--", *LLAMA_RUN],
            "--tpu_topology=tpu7x:2x2x3: there are no such slices",
        ),
        (
            ["--tpu_topology=v6e:4x4", "--slices=2", "--", *LLAMA_RUN],
            "config.mesh.dcn_…: the cross-slice sizes multiply to 1",
        ),
    ],
)
def test_what_train_would_refuse_becomes_no_manifest(given, words, capsys):
    code, text = runs.refusal("launch", "kubernetes", "--image=x", *given)
    assert code == 2 and text.startswith(words) and not capsys.readouterr().out


# ---- SLURM ----

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


def test_every_scheduler_gives_its_job_a_secret(tmp_path):
    line = launch_slurm.make_secret()
    assert f"\n{line}\n" in (LAUNCH / "slurm.sbatch").read_text()
    made = [
        subprocess.run(
            ["bash", "-c", f"{line}; printenv GPT_JAX_JOB"], capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert all(re.fullmatch("[0-9a-f]{32}\n", text) for text in made) and made[0] != made[1]

    options = launch_kubernetes.KubernetesOptions("i", "n", 2, 8, None, 1, 0, 0)
    env = parts(launch_kubernetes.make_jobset(options, ["train"]))[3]["env"]
    (secret,) = [item for item in env if item["name"] == "GPT_JAX_JOB"]
    # Kubernetes puts this label on all pods of a Job, with the number of that Job.
    where = secret["valueFrom"]["fieldRef"]["fieldPath"]
    assert where == "metadata.labels['batch.kubernetes.io/controller-uid']"


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


@pytest.mark.parametrize(
    "given, words",
    [
        (["--time=60"], "gpt-jax launch slurm: what is to run is missing"),
        (["--time=5", "train"], "--time=5: expected 6 to"),
        (["--time=9", "tarin"], "gpt-jax launch slurm: 'tarin' is no flag"),
        (["--nodes=0", "--time=9", "train"], "--nodes=0: "),
        (["--time=9", "sweep"], "gpt-jax launch slurm: 'sweep' is no flag"),
        (["--time=9", "--sbatch", "mem", "train"], "--sbatch=mem: expected NAME=VALUE"),
        (
            ["--time=9", "--sbatch=mem=1G", "--sbatch=mem=2G", "train"],
            "--sbatch=mem=2G: mem is given twice",
        ),
        (["--time=9", "--sbatch=N=3", "train"], "--sbatch=N=3: expected the long name"),
        (
            ["--time=9", "--sbatch=gpus-per-task=1", "train"],
            "--sbatch=gpus-per-task=1: the launcher sets gpus-per-task; leave it",
        ),
        *(
            (
                ["--time=9", f"--sbatch={name}=1", "train"],
                f"--sbatch={name}=1: the launcher sets {name}; {way}",
            )
            for name, way in (
                ("nodes", "use --nodes"),
                ("ntasks-per-node", "use --tasks_per_node"),
                ("job_name", "use --name"),
                ("output", "use --logs"),
                ("partition", "use --partition"),
                ("time", "use --time"),
                ("signal", "leave it out"),
                ("requeue", "leave it out"),
                ("array", "leave it out"),
                ("open-mode", "leave it out"),
            )
        ),
        (
            ["--time=9", "--gpus_per_node=8", "--sbatch=gpus-per-node=4", "train"],
            "--sbatch=gpus-per-node=4: the launcher sets",
        ),
    ],
)
def test_bad_slurm_flags(given, words):
    code, text = runs.refusal("launch", "slurm", *given)
    assert code == 2 and text.startswith(words)


@pytest.mark.parametrize(
    "given, words",
    [
        (["train", "--workdir=/w", "--config=c.py"], "--config=c.py: no such file"),
        ([*LLAMA_RUN, "--coordinator=a:1"], "--coordinator: the launcher gives it"),
        ([*LLAMA_RUN, "--config.trian.steps=1"], "config.trian = '1': unknown key"),
        (
            [*LLAMA_RUN, "--config.mesh.fsdp=3"],
            "config.mesh.fsdp = 3: a mesh of 3 does not match 16 devices",
        ),
        (
            [*LLAMA_RUN, "--cpu_devices=8", "--config.mesh.data=3"],
            "config.mesh.data = 3: a mesh of 3 does not match 16 devices",
        ),
    ],
)
def test_what_train_would_refuse_is_not_submitted(given, words, tmp_path):
    shape = ["--nodes=2"] + ["--gpus_per_node=8"] * ("--cpu_devices=8" not in given)
    code, text = runs.refusal(
        "launch", "slurm", *shape, "--time=9", f"--logs={tmp_path / 'logs'}", "--", *given
    )
    assert code == 2 and text.startswith(words) and not (tmp_path / "logs").exists()


def test_what_submitit_sets_is_refused_of_sbatch():
    made = launch_slurm.make_slurm_parameters(launch_slurm.SlurmShape(2, 8, 8, 60, 20, "n"), {})
    no_options = {"srun_args", "stderr_to_stdout", "setup", "teardown", "additional_parameters"}
    assert {*made, *made["additional_parameters"]} - no_options <= set(launch_slurm.OWN)
    assert launch_slurm.parse_sbatch_options(["gpus-per-node=a100:4", "mem=64G"], 0) == {
        "gpus_per_node": "a100:4",
        "mem": "64G",
    }


@pytest.mark.parametrize("logs", ["{0}/file", "{0}/file/below", "/proc/xx", "/proc"])
def test_logs_that_cannot_be_written(tmp_path, logs):
    (tmp_path / "file").touch()
    logs = logs.format(tmp_path)
    code, text = runs.refusal("launch", "slurm", "--time=9", f"--logs={logs}", "--", *LLAMA_RUN)
    assert code == 2 and text.startswith(f"--logs={logs}: cannot be written (")


@pytest.mark.parametrize("option", ["gres=gpu:8", "gpus-per-node=a100:8"])
def test_slurm_may_give_gpus_by_other_options(tmp_path, monkeypatch, option):
    """The number of devices is then not known here, so no mesh is refused for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = runs.refusal(
        "launch",
        "slurm",
        "--time=9",
        "--sbatch",
        option,
        f"--logs={tmp_path}",
        "--",
        *LLAMA_RUN,
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
    )
    assert code == 2 and text.startswith("launch slurm: there is no sbatch here")


@pytest.mark.parametrize("programs", [[], ["srun"]])
def test_no_slurm_here(tmp_path, monkeypatch, programs):
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = runs.refusal("launch", "slurm", "--time=9", f"--logs={tmp_path}", "--", *LLAMA_RUN)
    assert code == 2 and ("sbatch" in text or "srun" in text)


# ---- TPU VMs ----

GCLOUD = """#!/bin/bash
echo "$@" >> {folder}/calls
case "$*" in *gpt-jax\\ train*)
    name=$5
    code=$(head -1 {folder}/$name); sed -i 1d {folder}/$name
    [ "$code" = unreachable ] && echo "ERROR: (gcloud) no account" && exit 1
    for worker in 0 1; do
        echo "worker $worker of $name"
        echo "gpt-jax begins"
        [ "$code" = lost ] || echo "gpt-jax ended with $code"
    done
esac
"""


def pod(folder, codes: dict[str, list], *flags, wait=""):
    """Runs tpu_pod.sh with a gcloud whose workers end with these codes, one an attempt.

    `wait` takes the place of waiting.
    """
    for name, content in (
        ("gcloud", GCLOUD.format(folder=folder)),
        ("sleep", f'#!/bin/sh\necho "$1" >> {folder}/waits\n{wait}\n'),
    ):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    for name, values in codes.items():
        (folder / name).write_text("".join(f"{value}\n" for value in values))
    return subprocess.run(
        [
            LAUNCH / "tpu_pod.sh",
            f"--tpu={','.join(codes) or 'a'}",
            "--zone=z",
            *flags,
            "--",
            "train",
            "--config=c.py",
            "--workdir=/w",
            "--config.data.path=a b",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        # A shell does not trap what it was started with ignoring, as a suite in the background is.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "codes, flags, ended, waits",
    [
        ({"a": [0]}, [], 0, ""),
        ({"a": [10, 40, 50, 0]}, [], 0, "5 10 20"),
        ({"a": [2]}, [], 2, ""),
        ({"a": [30]}, [], 30, ""),
        ({"a": [40, 0], "b": ["lost", 0]}, [], 0, "5"),
        ({"a": [40], "b": [2]}, [], 2, ""),
        ({"a": [41] * 9}, ["--restarts=2"], 41, "5 10"),
        ({"a": [40, "unreachable", 0]}, [], 0, "5 10"),
    ],
)
def test_tpu_pod_restarts_by_the_policy(tmp_path, codes, flags, ended, waits):
    done = pod(tmp_path, codes, *flags)
    assert done.returncode == ended, done.stdout + done.stderr
    found = (tmp_path / "waits").read_text().split() if (tmp_path / "waits").exists() else []
    assert " ".join(found) == waits and ("worker 1 of a" in done.stdout)


def test_tpu_pod_stops_where_no_worker_was_ever_reached(tmp_path):
    done = pod(tmp_path, {"a": ["unreachable", 0], "b": ["unreachable", 0]})
    assert (
        done.returncode == 2
        and "no account" in done.stdout
        and "no worker was reached" in done.stderr
    )
    assert not (tmp_path / "waits").exists()


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_request_while_tpu_pod_waits_ends_it_at_once(tmp_path, number):
    done = pod(
        tmp_path, {"a": [41, 0]}, wait=f"kill -{number} $PPID; exec {shutil.which('sleep')} 600"
    )
    assert done.returncode == 41, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text()
    assert (
        calls.count("gpt-jax train") == 1 and "pkill -TERM" in calls and "pkill -KILL" not in calls
    )


def test_tpu_pod_dry_run_prints_and_runs_nothing(tmp_path):
    done = pod(tmp_path, {"a": [], "b": []}, "--dry_run", "--project=p")
    assert done.returncode == 0 and not (tmp_path / "calls").exists()
    for line, name in zip(done.stdout.splitlines(), "ab", strict=True):
        words = shlex.split(line)
        assert words[:8] == [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "ssh",
            name,
            "--zone=z",
            "--project=p",
        ]
        assert words[8] == "--worker=all" and words[9].startswith(
            r'--command=echo "gpt-jax begins"; cd gpt_jax && .venv/bin/gpt-jax train --config=c.py '
            r"--workdir=/w "
            r"--config.data.path=a\ b --distributed; echo"
        )


@pytest.mark.parametrize(
    "given, words",
    [
        ([], "--tpu=NAME"),
        (["--tpu=a"], "what is to run"),
        (["--tpu=a", "--zoen=b"], "unknown flag"),
        (["--tpu=a", "--restarts=x", "--", "train"], "--restarts=x: expected"),
        *(
            (
                ["--tpu=a", f"--folder={text}", "--setup"],
                f"--folder={text}: expected a folder of its own",
            )
            for text in (
                "",
                "~/x",
                "/x/../y",
                ".",
                "..",
                "-x",
                "a b",
                "/",
                "//",
                "a//b",
                "a/./b",
                "a//",
            )
        ),
        (["--tpu=a", "--", "train", "--config=c.py"], "train needs --workdir=DIR"),
        (["--tpu=a", "--", "train", "--workdir=/w"], "train needs --config=FILE"),
        (["--tpu=a,", "--", "train"], "--tpu=a,: an empty"),
        (["--tpu=a", "--", "trian"], "'trian' is no command"),
        (["--tpu=a", "--", "evaluate", "--distributed"], "--distributed: the launcher gives it"),
    ],
)
def test_bad_tpu_pod_flags(given, words):
    done = subprocess.run([LAUNCH / "tpu_pod.sh", *given], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("flag", launch.PLACES)
def test_all_launchers_know_the_flags_of_a_process_s_place(flag):
    given = ["train", "--config=c.py", "--workdir=/w", f"{flag}=1"]
    done = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--tpu=a", "--", *given], capture_output=True, text=True
    )
    words = f"{flag}: the launcher gives it to each process; leave it out"
    assert done.returncode == 2 and words in done.stderr
    for engine in (
        ["local"],
        ["slurm", "--time=9"],
        ["kubernetes", "--image=x", "--gpus_per_node=1"],
    ):
        assert runs.refusal("launch", *engine, "--", *given) == (2, words)


def test_tpu_pod_help():
    done = subprocess.run([LAUNCH / "tpu_pod.sh", "--help"], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "--tpu=NAME" in done.stdout
        and "set -" not in done.stdout
        and not done.stderr
    )


WORKER = """#!/bin/bash
cd {home}
case $4 in
scp) cp "$5" "${{6#*:}}" ;;
ssh) for word in "$@"; do case $word in --command=*) bash -c "${{word#*=}}" ;; esac done ;;
esac
"""


@pytest.mark.parametrize("git", [True, False])
def test_setup_copies_the_checkout_and_nothing_else(tmp_path, git):
    """It runs twice, on a stand-in for a worker that has run something in between."""
    home, root = tmp_path / "home", tmp_path / "checkout"
    for path, text in {
        "launch/environment.sh": "make_environment() { touch made; }\n",
        "gpt_jax/a.py": "",
        "gpt_jax/b c.py": "",
        "runs/big": "",
        ".venv/x": "",
        ".gitignore": "runs/\n.venv/\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    shutil.copy(LAUNCH / "tpu_pod.sh", root / "launch")
    if git:
        for words in (
            ["init", "-q"],
            ["add", "gpt_jax/a.py"],
            ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "x"],
        ):
            subprocess.run(["git", "-C", root, *words], check=True)
    home.mkdir()
    (tmp_path / "gcloud").write_text(WORKER.format(home=home))
    (tmp_path / "gcloud").chmod(0o755)

    def files():
        done = subprocess.run(
            [root / "launch/tpu_pod.sh", "--tpu=a", "--setup"],
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}

    wanted = {
        f"gpt_jax/{name}"
        for name in (
            "launch/environment.sh",
            "launch/tpu_pod.sh",
            "gpt_jax/a.py",
            "gpt_jax/b c.py",
            ".gitignore",
            "made",
        )
    }
    assert files() == wanted
    (home / "gpt_jax/runs").mkdir()
    (home / "gpt_jax/runs/mine").touch()
    (root / "gpt_jax/a.py").unlink()
    assert files() == wanted - {"gpt_jax/gpt_jax/a.py"} | {"gpt_jax/runs/mine"}


# ---- the container file ----


def test_dockerfile_copies_what_is_there_and_names_extras_that_exist():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [
        line.split(maxsplit=1)
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert {word for word, _ in lines} <= {
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    }
    for word, rest in lines:
        if word == "COPY":
            assert all((runs.ROOT / name).exists() for name in rest.split()[:-1]), rest
        if word in ("ENTRYPOINT", "CMD"):
            json.loads(rest)  # exec form: SIGTERM reaches the program
    extras = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = dict(re.findall(r'(cpu|cuda|tpu)\) extra="\[?(\w*)\]?"', text))
    assert set(named) == {"cpu", "cuda", "tpu"} and {
        name for name in named.values() if name
    } <= set(extras)
    (install,) = [rest for word, rest in lines if word == "RUN"]
    assert ". launch/environment.sh && pip install" in re.sub(r"\s+", " ", install)
    assert '--constraint "$(choose_constraints . python)"' in install
    subprocess.run(["sh", "-n", "-c", install], check=True)


def test_shell_scripts_parse():
    for path in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)
