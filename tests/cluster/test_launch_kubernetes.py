"""Manifests of `gpt-jax launch kubernetes`, against the schema of JobSets.

No cluster of Kubernetes was used.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import forks
import pytest
import runs
import yaml
from launchers import LAUNCH, parts

from gpt_jax import errors
from gpt_jax.cluster import launch_kubernetes
from gpt_jax.hardware.chips import CHIPS

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
