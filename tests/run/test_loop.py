"""Whole runs: meshes, kills, signals, resuming and damage change no number."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import forks
import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.errors import Diverged, Stopped, UsageError
from gpt_jax.evals import evaluators
from gpt_jax.metrics.sessions import find_sessions
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.model.count import count_params
from gpt_jax.run import evaluation, loop
from gpt_jax.run.evaluation import heldout_batches
from gpt_jax.run.progress import Progress
from gpt_jax.train import read_meta
from gpt_jax.train.checkpoint.manifest import CHECKPOINT_FOLDER, steps_in
from gpt_jax.train.optim.schedule import make_schedule

GROUPS = """(
    {'match': '^embed/', 'rate': 2.0},
    {'match': '/value_embed/', 'rate': 1.5},
    {'match': '^residual/'},
    {'match': '^(blocks|tail)/.*/kernel$', 'optimizer': 'muon', 'rate': 2.0, 'weight_decay': 0.1},
)"""
MODERN = (
    "--config.model.heads=8",
    "--config.model.norm=plain_rmsnorm",
    "--config.model.position=rotary",
    "--config.model.pattern=(('attention', 'relu2'),)",
    "--config.model.qk_norm=true",
    "--config.model.tied=false",
    "--config.model.bias=false",
    "--config.model.value_embed=true",
    "--config.model.residual_scalars=true",
    "--config.model.logit_softcap=15",
    "--config.model.windows=(8, 0)",
    f"--config.optim.groups={GROUPS}",
    "--config.data.packing=chunk",
    "--config.data.document_mask=true",
    "--config.data.split=document",
)
# Every axis is here. Data and fsdp alone are in tests/run/test_mesh_matrix.py.
MESHES = ((1, 1, 8), (2, 2, 2))


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


def test_same_losses_on_one_device_and_on_every_mesh(tmp_path):
    config = documents(tmp_path, MODERN)
    wanted = runs.losses(runs.build(config))
    assert wanted[-1] < wanted[0] - 1
    for shape in MESHES:
        np.testing.assert_allclose(
            runs.losses(runs.build(config, *shape)), wanted, rtol=1e-5, err_msg=str(shape)
        )


def documents(folder, variant):
    """The config of `variant` on a text of thirty documents."""
    text = runs.write_text(folder / "text.jsonl", documents=30)
    return runs.load(folder, *variant, f"--config.data.path={text}")


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


def test_what_a_run_leaves_in_its_workdir(tmp_path):
    parts = runs.build(
        runs.load(
            tmp_path,
            "--config.log.tensorboard=true",
            "--config.train.steps=10",
            "--config.eval.every_steps=5",
            "--config.checkpoint.every_steps=5",
        )
    )
    run = tmp_path / "run"
    runs.run(parts, run, profile=(3, 4))
    rows = read_jsonl(run / "metrics.jsonl")
    keys = {key for row in rows for key in row}
    assert keys >= {
        "step",
        "train/loss",
        "train/bits_per_byte",
        "train/accuracy",
        "train/learning_rate",
        "eval/loss",
        "train/grad_norm",
        "train/param_norm",
        "eval/bits_per_byte",
        "eval/perplexity",
        "eval/accuracy",
        "throughput/tokens_per_second",
        "throughput/tokens_seen",
        "throughput/mfu_full",
        "time/compile",
        "throughput/mfu_causal",
        "time/data",
        "time/step",
        "time/eval",
        "time/checkpoint",
    }
    assert list(runs.curve(run)) == list(range(1, 11)) and list(runs.curve(run, "eval/loss")) == [
        5,
        10,
    ]
    assert configs.from_dict(json.loads((run / "config.json").read_text())) == parts.config
    assert steps_in(run / CHECKPOINT_FOLDER) == [5, 10]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "<html" in page and 'src="http' not in page and 'href="http' not in page
    assert list((run / "profile").rglob("*.xplane.pb")) and list((run / "tensorboard").iterdir())


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


def test_what_a_run_says(tmp_path):
    """It says what was chosen and proved before the first step.

    At its end it has numbers, samples and places.
    """
    run, lines = tmp_path / "run", []
    parts = runs.build(
        runs.load(
            tmp_path,
            "--config.train.steps=6",
            "--config.eval.samples=3",
            "--config.eval.sample_every_steps=2",
            "--config.eval.compare_xz=true",
            "--config.data.packing=chunk",
            "--config.data.document_mask=true",
        )
    )
    runs.run(parts, run, lines.append)
    for beginning in (
        "mesh: ",
        "attention kernel: blocked (fastest known on cpu); differs from reference by ",
        "parameters: ",
        "tokens: ",
        "optimiser: ",
        "chunk rows: ",
        "held-out bits per byte ",
        "host overhead ",
        "waiting for data ",
        *(f"{name} " for name in ("checkpoints", "metrics", "loss curve", "report")),
    ):
        assert [line for line in lines if line.startswith(beginning)], beginning
    text = "\n".join(lines)
    assert (
        "no segment leak" in text
        and "documents of a row: the whole model keeps them apart" in text
        and "xz -9: " in text
        and "GFLOP/s" in text
        and str(run / "report.html") in text
    )
    assert [
        (row["step"], key)
        for row in read_jsonl(run / "metrics.jsonl")
        for key in row
        if "sample/" in key
    ] == [(2, "sample/0"), (4, "sample/0"), *((6, f"sample/{i}") for i in range(3))]
    assert list(runs.curve(run, "time/step")) == list(range(1, 7))  # each step once

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    runs.run(parts, run, lines.append)  # the same command once more
    assert lines[-1].startswith("finished before, at step 6: see ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_logged_numbers_are_what_they_are_called(tmp_path):
    """The run is resumed once.

    Checked are the rate of the update, the tokens since the first step, and MFU with the whole
    attention map and with half of it.
    """
    overrides = (
        "--config.optim.decay_steps=6",
        "--config.eval.every_steps=0",
        "--config.model.windows=(8, 0)",
    )
    for steps in (3, 6):
        parts = runs.build(runs.load(tmp_path, *overrides, f"--config.train.steps={steps}"))
        runs.run(parts, tmp_path / "run")

    def curve(key):
        return runs.curve(tmp_path / "run", key)

    factor = make_schedule(parts.config.optim)
    assert curve("train/learning_rate") == pytest.approx(
        {n: 1e-2 * float(factor(n - 1)) for n in range(1, 7)}
    )
    assert curve("throughput/tokens_seen") == {n: n * 8 * 32 for n in range(1, 7)}
    matmuls, attention = (
        6 * count_params(parts.config.model)["matmul"],
        12 * 32 * np.array([8 + 32, 7 + 16]),
    )
    full, causal = curve("throughput/mfu_full"), curve("throughput/mfu_causal")
    assert full and {n: full[n] / causal[n] for n in full} == pytest.approx(
        dict.fromkeys(full, (matmuls + attention[0]) / (matmuls + attention[1]))
    )


def test_a_line_has_the_means_since_the_line_before(tmp_path):
    def losses(name, *given):
        given = ("--config.train.steps=7", "--config.eval.every_steps=0", *given)
        runs.run(runs.build(runs.load(tmp_path, *given)), tmp_path / name)
        return runs.curve(tmp_path / name)

    each = losses("each", "--config.log.every_steps=1")
    means = losses("means", "--config.log.every_steps=3")
    spans = {3: (1, 2, 3), 6: (4, 5, 6), 7: (7,)}
    wanted = {last: np.mean([each[step] for step in steps]) for last, steps in spans.items()}
    assert means == pytest.approx(wanted, rel=1e-6)


def test_rates_are_those_of_whole_steps(tmp_path):
    """A step that is fetched late belongs to the time when it ran, also before an evaluation."""
    parts = runs.build(runs.load(tmp_path, "--config.train.steps=40"))
    lines = []
    sizes = runs.configs.make_batch_sizes(parts.config.train)
    progress = Progress(parts, tmp_path, 0, False, print, {}, dict, lines.append, {}, [], sizes)
    names = ("objective", "loss", "bits_per_byte", "accuracy", "grad_norm", "param_norm")
    sums = {name: (np.float32(1), np.float32(1)) for name in names}
    progress.mark = 0, 100.0
    for step in range(1, 13):
        progress.record((step, sums), 100.0 + 2 * step)
    progress.writers.close()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    rates = [row["throughput/tokens_per_second"] for row in rows if "train/loss" in row]
    tokens = parts.config.train.batch_size * parts.config.train.seq_len
    assert rates == [tokens / 2] * 12
    assert len(lines) == 1 and lines[0].startswith(f"{tokens / 2:,.0f} tokens/s so far: step 40")


def test_dropout_acts_in_training_alone(tmp_path):
    plain, dropped = (
        runs.build(runs.load(tmp_path, f"--config.model.dropout={rate}")) for rate in (0.0, 0.5)
    )
    assert abs(runs.losses(plain, 5)[-1] - runs.losses(dropped, 5)[-1]) > 1e-3
    rows = np.arange(8 * 32).reshape(8, 32) % 256
    batch = {
        "tokens": rows,
        "targets": rows,
        "weight": np.ones((8, 32), np.float32),
        "bytes": rows * 0 + 1,
    }
    with jax.set_mesh(plain.mesh):
        params = plain.init().params
        values = [float(parts.eval_step(params, batch)["loss"][0]) for parts in (plain, dropped)]
    assert values[0] == pytest.approx(values[1])


def test_bfloat16_trains_like_float32(tmp_path):
    exact, rounded = (
        runs.losses(runs.build(runs.load(tmp_path, f"--config.compute.dtype={dtype}")))
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded, exact, rtol=0.02)
    assert rounded != exact


def test_samples_come_from_the_averages(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluation,
        "draw_samples",
        lambda model, compute, params, *rest: seen.append(params) or ["text"] * rest[3],
    )
    flags = ("--config.train.steps=4", "--config.train.ema=0.9", "--config.eval.samples=3")
    parts = runs.build(runs.load(tmp_path, *flags))
    runs.run(parts, tmp_path / "run")
    assert not runs.differing(
        runs.by_path(seen[-1]), runs.by_path(runs.restored(parts, tmp_path / "run").ema)
    )


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
