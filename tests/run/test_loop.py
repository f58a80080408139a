"""Whole runs: no mesh changes a number, and what a run says and leaves is true."""

import json

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.model.count import count_params
from gpt_jax.run import evaluation
from gpt_jax.run.progress import Progress
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
    progress = Progress(parts, tmp_path, 0, False, print, {}, {}, dict, lines.append, {}, [], sizes)
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
