"""What all launchers share: codes to restart at, a secret, and the flags of a place.

The container file and the shell scripts are here too. No image was built.
"""

import json
import re
import subprocess
import tomllib

import pytest
import runs
from launchers import LAUNCH, parts

from gpt_jax import errors
from gpt_jax.cluster import launch_kubernetes, launch_slurm
from gpt_jax.commands import launch


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
