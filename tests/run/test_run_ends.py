"""What ends a run: a divergence, a request, a watchdog. What must not: a reader that leaves."""

import contextlib
import os
import random
import signal
import subprocess
import sys

import forks
import numpy as np
import pytest
import runs

from gpt_jax.errors import Diverged, Stopped
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.run import loop
from gpt_jax.run.evaluation import heldout_batches
from gpt_jax.train.checkpoint.manifest import CHECKPOINT_FOLDER, steps_in


@pytest.mark.parametrize("steps", [6, 1])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, steps):
    """It does so at the last step too, and every checkpoint has finite numbers."""
    parts = runs.build(
        runs.load(
            tmp_path,
            "--config.optim.learning_rate=1e38",
            "--config.checkpoint.every_steps=1",
            f"--config.train.steps={steps}",
            "--config.optim.warmup_steps=0",
        )
    )
    words = r"at step \d is (nan|inf).*config\.optim\.learning_rate"
    with pytest.raises(Diverged, match=words) as ended:
        runs.run(parts, tmp_path / "run")
    saved = steps_in(tmp_path / "run" / CHECKPOINT_FOLDER)
    told = f"the last checkpoint, of step {saved[-1]}," if saved else "nothing was saved before it"
    assert told in str(ended.value)
    if saved:
        assert all(
            np.isfinite(x).all() for x in runs.final_state(parts, tmp_path / "run")[1].values()
        )


def test_batches_without_a_target_are_no_divergence(tmp_path):
    """Most documents are one character, and only a few rows hold one that is longer."""
    rng = random.Random(0)
    lines = [rng.choice("abcdefgh") for _ in range(3000)]
    lines[::500] = ["abc"] * 6
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(lines) + "\n")
    (tmp_path / "held.txt").write_text("a\n" * 2000 + "abc\n")
    parts = runs.build(
        runs.load(
            tmp_path,
            f"--config.data.path={text}",
            "--config.data.tokenizer=char",
            "--config.data.documents=line",
            "--config.data.document_mask=true",
            "--config.data.packing=chunk",
            f"--config.data.eval_path={tmp_path / 'held.txt'}",
            "--config.eval.batches=1",
            "--config.train.batch_size=1",
            "--config.train.steps=8",
            "--config.log.every_steps=1",
        )
    )
    said = []
    runs.run(parts, tmp_path / "run", said.append)
    told = [line for line in said if "without a single target" in line]
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    empty = [row["step"] for row in rows if row.get("train/grad_norm") == 0]
    assert 0 < len(empty) < 8 and len(told) == len(empty)
    assert any("no target in 1 held-out batch of source text" in line for line in said)
    assert not any("eval/loss" in row for row in rows)
    for row in rows:
        if "train/grad_norm" in row:
            assert ("train/loss" in row) == (row["step"] not in empty)
            assert "nonfinite" not in row


def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path):
    """The run of `train … 2>&1 | head -1` comes to its end, with a good checkpoint."""
    given = runs.arguments(tmp_path, tmp_path / "run", "--config.train.steps=5")
    process = forks.Popen(
        [sys.executable, "-m", "gpt_jax", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(runs.SECONDS) == 0
    assert (
        steps_in(tmp_path / "run" / CHECKPOINT_FOLDER) == [5]
        and (tmp_path / "run/report.html").exists()
    )


STUCK = """
import sys, time
from gpt_jax.run import evaluation, loop
from gpt_jax.run.evaluation import heldout_batches
from gpt_jax.commands.main import main
make = loop.make_ramp_stream
class Stuck:
    def __init__(self, stream):
        self.stream, self.left, self.summary, self.shares = stream, 3, stream.summary, stream.shares
    def __next__(self):
        self.left -= 1
        time.sleep(0 if self.left else 3600)
        return next(self.stream)
    def close(self):
        self.stream.close()
loop.make_ramp_stream = lambda *a, **k: Stuck(make(*a, **k))
main(sys.argv[1:])
"""


def test_the_watchdog_ends_a_run_that_hangs(tmp_path):
    given = runs.arguments(tmp_path, tmp_path / "run", "--config.train.hang_minutes=0.1")
    process = runs.Process(tmp_path / "logs", given, ("-c", STUCK))
    process.end(41)
    assert "no step ended for 0.1 minutes (config.train.hang_minutes)" in process.err
    assert "most recent call first" in process.err  # every thread's stack


def test_a_stop_at_a_step_leaves_its_evaluation_out(tmp_path):
    """The run saves first.

    The last step's evaluation is made up for when the run is called again.
    """
    config = runs.load(
        tmp_path,
        "--config.train.steps=4",
        "--config.eval.every_steps=2",
        "--config.checkpoint.every_steps=0",
    )
    parts, steps = runs.build(config), []

    def train(*given):
        steps.append(len(steps) + 1)
        if steps[-1] in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return parts.train_step(*given)

    for step in (2, 4):
        with pytest.raises(Stopped, match=f"^stopped on request after step {step} of 4, saved in"):
            runs.run(parts._replace(train_step=train), tmp_path / "run")
        assert (
            not runs.curve(tmp_path / "run", "eval/loss")
            and runs.final_state(parts, tmp_path / "run")[0] == step
        )
    runs.run(parts._replace(train_step=train), tmp_path / "run")
    assert steps == [1, 2, 3, 4] and list(runs.curve(tmp_path / "run", "eval/loss")) == [4]


@pytest.mark.parametrize("every, stops_after", [(10, 10), (0, 20)])
def test_a_stop_in_an_evaluation_does_not_wait_for_its_end(tmp_path, every, stops_after):
    """It comes in an evaluation on the way, and in the last one.

    The run saves. What was not measured is measured when the run resumes and ends.
    """
    config = runs.load(
        tmp_path,
        "--config.train.steps=20",
        f"--config.eval.every_steps={every}",
        "--config.eval.batches=6",
        "--config.checkpoint.every_steps=0",
    )
    parts, asked = runs.build(config), []

    def first(*given):
        asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return parts.eval_step(*given)

    with pytest.raises(
        Stopped, match=f"^stopped on request after step {stops_after} of 20, saved in"
    ):
        runs.run(parts._replace(eval_step=first), tmp_path / "run")
    assert len(asked) == 1 and not runs.curve(tmp_path / "run", "eval/loss")
    assert runs.final_state(parts, tmp_path / "run")[0] == stops_after
    runs.run(parts, tmp_path / "run")
    assert list(runs.curve(tmp_path / "run", "eval/loss")) == [20]
    assert list(runs.curve(tmp_path / "run")) == list(range(1, 21))


def test_the_watchdog_sees_an_evaluation_go_on(tmp_path, monkeypatch):
    """An evaluation that takes longer than the limit is no hang as long as its batches end."""
    beats = []

    @contextlib.contextmanager
    def counting(minutes):
        yield lambda: beats.append(minutes)

    monkeypatch.setattr(loop, "watchdog", counting)
    parts = runs.build(runs.load(tmp_path, "--config.train.steps=2", "--config.eval.every_steps=1"))
    runs.run(parts, tmp_path / "run")
    # One is for the state that the run starts from, which may be long in coming.
    assert len(beats) == 1 + 2 * (2 + len(heldout_batches(parts)["text"]))
