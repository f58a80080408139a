"""Killed, stopped and damaged runs go on to the same numbers. The best checkpoint stays."""

import json
import random
import shutil
import signal
import time

import pytest
import runs

from gpt_jax.errors import UsageError
from gpt_jax.evals import evaluators
from gpt_jax.metrics.sessions import find_sessions
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.train import read_meta
from gpt_jax.train.checkpoint.manifest import CHECKPOINT_FOLDER, steps_in


def test_resumed_with_averaged_weights_to_the_bit(tmp_path, capsys):
    """Twenty steps at once are ten steps, and then ten more.

    `evaluate` measures the averaged weights, as the run did at its end.
    """
    overrides = ("--config.train.ema=0.9", "--config.optim.decay_steps=20")
    parts = runs.build(runs.load(tmp_path, *overrides))
    half = runs.build(runs.load(tmp_path, *overrides, "--config.train.steps=10"))
    lines = []
    runs.run(parts, tmp_path / "whole")
    runs.run(half, tmp_path / "parts")
    runs.run(parts, tmp_path / "parts", lines.append)
    assert any(line.startswith("resumed from step 10 of ") for line in lines)
    assert "config.train.steps changed since the checkpoint: 10 -> 20" in lines
    assert list(runs.curve(tmp_path / "whole")) == list(range(1, 21))
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        assert runs.curve(tmp_path / "parts", key) == runs.curve(tmp_path / "whole", key)
    step, arrays = runs.final_state(parts, tmp_path / "whole")
    assert step == 20 and not runs.differing(arrays, runs.final_state(parts, tmp_path / "parts")[1])

    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={tmp_path / 'parts'}", "--json", "--cpu_devices=8")
    loss = json.loads(capsys.readouterr().out)["sources"]["held-out"]["loss"]
    assert loss == pytest.approx(runs.curve(tmp_path / "whole", "eval/loss")[20], rel=1e-6)
    assert loss != pytest.approx(
        runs.heldout_loss(parts, tmp_path / "whole"), rel=1e-3
    )  # the weights themselves


def test_killed_and_stopped_again_and_again_to_the_bit(tmp_path):
    """SIGKILL twice, SIGTERM and SIGUSR1 leave no trace in a run that then comes to its end."""
    overrides = (
        "--config.train.steps=200",
        "--config.checkpoint.every_steps=10",
        "--config.eval.every_steps=50",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.Process(tmp_path / "logs", runs.arguments(tmp_path, whole, *overrides)).end(0)
    draw = random.Random(20)
    for number, low in (
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 40),
        (signal.SIGTERM, 80),
        (signal.SIGUSR1, 120),
    ):
        process = runs.Process(tmp_path / "logs", runs.arguments(tmp_path, broken, *overrides))
        step = draw.randrange(low, low + 30)
        process.until(runs.logged(broken, step), f"step {step}")
        time.sleep(draw.uniform(0, 0.03))
        process.signal(number)
        process.end(10 if number != signal.SIGKILL else -signal.SIGKILL)
        if number != signal.SIGKILL:
            stopped = int(process.err.split("stopped on request after step ")[1].split()[0])
            assert (
                steps_in(broken / CHECKPOINT_FOLDER)[-1] == stopped
                and "Traceback" not in process.err
            )
    process = runs.Process(tmp_path / "logs", runs.arguments(tmp_path, broken, *overrides))
    process.end(0)
    assert f"resumed from step {stopped} of " in process.out
    for key in ("train/loss", "eval/loss"):
        assert runs.curve(broken, key) == runs.curve(whole, key)
    assert list(runs.curve(broken)) == list(range(1, 201))
    parts = runs.build(runs.load(tmp_path, *overrides))
    step, arrays = runs.final_state(parts, whole)
    assert step == 200 and not runs.differing(arrays, runs.final_state(parts, broken)[1])


def test_saved_on_eight_devices_same_loss_on_one_and_four(tmp_path):
    config = runs.load(tmp_path)
    runs.run(runs.build(config, 2, 2, 2), tmp_path / "run")
    wanted = runs.curve(tmp_path / "run", "eval/loss")[20]
    for shape in ((1, 1, 1), (1, 2, 2)):
        assert runs.heldout_loss(runs.build(config, *shape), tmp_path / "run") == pytest.approx(
            wanted, rel=1e-6
        )


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path):
    parts = runs.build(runs.load(tmp_path, "--config.checkpoint.every_steps=5"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.run(parts, whole)
    shutil.copytree(whole, broken)
    victim = max(
        (path for path in (broken / CHECKPOINT_FOLDER / "20/params").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    lines = []
    runs.run(parts, broken, lines.append)
    named = [line for line in lines if "is damaged and is passed over" in line]
    assert len(named) == 1 and "step 20" in named[0] and victim.name in named[0]
    assert any(line.startswith("resumed from step 15 of ") for line in lines)
    assert runs.curve(broken) == runs.curve(whole)
    assert not runs.differing(runs.final_state(parts, whole)[1], runs.final_state(parts, broken)[1])


def test_a_changed_config_is_reported_key_by_key(tmp_path):
    runs.run(runs.build(runs.load(tmp_path, "--config.train.steps=4")), tmp_path / "run")
    lines = []
    allowed = (
        "--config.log.every_steps=2",
        "--config.train.steps=6",
        "--config.optim.decay_steps=4",
    )
    runs.run(runs.build(runs.load(tmp_path, *allowed)), tmp_path / "run", lines.append)
    changed = [line for line in lines if "changed since the checkpoint" in line]
    assert changed == [
        "config.train.steps changed since the checkpoint: 4 -> 6",
        "config.log.every_steps changed since the checkpoint: 1 -> 2",
    ]
    assert list(runs.curve(tmp_path / "run")) == [1, 2, 3, 4, 6]
    first, second = find_sessions(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert (first.number, first.step, second.number, second.step) == (1, 0, 2, 4)
    assert second.facts["changed"] == "train.steps: 4 -> 6, log.every_steps: 1 -> 2"
    assert "changed" not in first.facts or not first.facts["changed"]
    assert second.wall_before > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "in 2 sessions" in page and "train.steps: 4 -&gt; 6" in page
    for override, key, old, new in (
        ("model.mlp=64", "model.mlp", 128, 64),
        ("seed=5", "seed", 0, 5),
    ):
        with pytest.raises(UsageError, match=rf"config\.{key} \({old} there, {new} now\)"):
            runs.run(
                runs.build(runs.load(tmp_path, f"--config.{override}", *allowed)), tmp_path / "run"
            )


@pytest.mark.parametrize("every", [4, 2])
def test_the_best_checkpoint_stays(tmp_path, monkeypatch, every):
    """A step that was not evaluated is not the best one."""
    values = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(evaluators, "compute_heldout_metrics", lambda sums: {"loss": next(values)})
    runs.run(
        runs.build(
            runs.load(
                tmp_path,
                "--config.train.steps=12",
                "--config.eval.every_steps=4",
                f"--config.checkpoint.every_steps={every}",
                "--config.checkpoint.keep_last=1",
                "--config.checkpoint.keep_best=1",
            )
        ),
        tmp_path / "run",
    )
    assert steps_in(tmp_path / "run" / CHECKPOINT_FOLDER) == [8, 12]


def test_the_best_is_saved_where_saves_and_evaluations_never_meet(tmp_path, monkeypatch):
    """Saves come at 5, 10, 15 and 17, evaluations at 3, 6, 9, 12, 15 and 17."""
    values = {3: 3.0, 6: 1.0, 9: 2.0, 12: 1.5, 15: 9.0, 17: 8.0}
    left = iter(values.values())
    monkeypatch.setattr(evaluators, "compute_heldout_metrics", lambda sums: {"loss": next(left)})
    config = runs.load(
        tmp_path,
        "--config.train.steps=17",
        "--config.eval.every_steps=3",
        "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep_last=1",
        "--config.checkpoint.keep_best=2",
    )
    runs.run(runs.build(config), tmp_path / "run")
    folder = tmp_path / "run" / CHECKPOINT_FOLDER
    assert steps_in(folder) == [6, 12, 17]
    kept = {step: read_meta(folder, step)["metrics"].get("eval/loss") for step in (6, 12, 17)}
    assert kept == {step: values[step] for step in (6, 12, 17)}
