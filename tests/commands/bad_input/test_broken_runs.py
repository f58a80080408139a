"""What breaks during a run ends it with one line and its exit code."""

import contextlib
import resource
import subprocess

import jax
import runs
from refusals import refused

from gpt_jax.train import CHECKPOINT_FOLDER
from gpt_jax.train.checkpoint import checkpoints


@contextlib.contextmanager
def files_at_most(size: int):
    """Writing more than `size` bytes to any file fails, as on a full disk.

    Nothing goes into the compilation cache of the other tests.
    """
    before, key = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        "jax_persistent_cache_min_compile_time_secs",
    )
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(key, 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update(key, seconds)


def test_full_disk_while_saving(folder, copy):
    more = runs.arguments(
        folder, copy, "--config.train.steps=4", "--config.checkpoint.every_steps=1"
    )
    with files_at_most(64 << 10):
        refused(
            50,
            [str(copy), "saving step 3 failed", "MiB free", "checkpoint of step 2 is untouched"],
            *more,
        )
    assert checkpoints.latest_valid(copy / CHECKPOINT_FOLDER) == 2
    runs.call(*more)  # room again: the same command goes on
    assert checkpoints.latest_valid(copy / CHECKPOINT_FOLDER) == 4


def test_a_run_that_diverges(folder, tmp_path):
    refused(
        30,
        ["at step 1 is", "config.optim.learning_rate", "config.optim.clip"],
        *runs.arguments(
            folder,
            tmp_path / "run",
            "--config.optim.learning_rate=1e38",
            "--config.optim.warmup_steps=0",
        ),
    )


def test_data_truncated_during_the_run(folder, tmp_path):
    """A real process ends with code 20 and one line below its output, without a traceback."""
    runs.arguments(folder, tmp_path)  # makes the text
    command = [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
        f"--config.data.path={folder}/text.txt",
        f"--config.data.cache={tmp_path}/cache",
        "--config.log.progress=false",
        "--config.train.steps=1000000",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=0",
    ]
    process = runs.Process(tmp_path / "process", command)
    try:
        process.until(runs.logged(tmp_path / "run", 3), "step 3")
        [tokens] = tmp_path.glob("cache/*/train.tokens")
        with open(tokens, "r+b") as file:
            file.truncate(100)
        process.end(20)
    finally:
        process.kill()
    *shown, line = process.err.splitlines()
    assert (
        line.startswith("gpt-jax: ")
        and "train.tokens: changed during the run" in line
        and "start again" in line
    )
    assert all(row.startswith(("step ", "process 0 of 1 ")) for row in shown)


def test_a_process_says_one_line(tmp_path):
    process = runs.Process(
        tmp_path,
        [
            "train",
            f"--config={runs.TINY}",
            "--config.model.heads=5",
            f"--config.data.path={runs.TINY}",
            f"--workdir={tmp_path}/run",
        ],
        start=subprocess.Popen,
    )
    process.end(2)
    assert (
        process.err.startswith("gpt-jax: config.model.heads = 5: does not divide")
        and process.err.count("\n") == 1
    )
    assert process.out == ""
