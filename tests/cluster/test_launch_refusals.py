"""Launchers of Kubernetes and SLURM refuse before anything is sent."""

import pytest
import runs
from launchers import LLAMA, LLAMA_RUN

from gpt_jax.cluster import launch_slurm


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
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--workdir=gs://bucket/run"],
            "--config.checkpoint.mirror=~/.cache/gpt_jax/mirror: lies in no --volume",
        ),
        (
            ["--gpus_per_node=8", "--", *LLAMA_RUN, "--workdir=hf://bucket/run"],
            "--workdir=hf://bucket/run: hf:// is no object store",
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
