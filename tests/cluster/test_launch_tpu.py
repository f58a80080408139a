"""`launch/tpu_pod.sh`, with a stand-in for gcloud.

No TPU was used.
"""

import os
import shlex
import shutil
import signal
import subprocess

import pytest
from launchers import LAUNCH

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
